"""What adapted linear layers compute beside their base, for whole batches and row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters import dora
from gauge_ext.adapters.rows import Rows, require_samples
from gauge_ext.errors import AdapterStateError

if TYPE_CHECKING:
    from gauge_ext.adapters.many import NamedAdapters
    from gauge_ext.adapters.slot import AdapterSlot


class Branch(NamedTuple):
    r"""What one product adds to a layer: :math:`s\,(B A \tilde x + \beta)`.

    Attributes:
        lora_A: A.
        lora_B: B.
        scaling: s.
        dropout_p: The probability with which an input of it is dropped, 0 outside of training.
        bias: :math:`\beta`, ``(out,)``, or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    bias: Tensor | None


def linear(
    layer: NamedAdapters,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: slice | None = None,
) -> Tensor:
    r"""Return the output of an unmerged linear layer with any adapters.

    .. math:: y = G \circ x W^T + \sum_k s_k\,(\tilde x A_k^T B_k^T + \beta_k) + b

    with the inputs after dropout :math:`\tilde x`, the branches' biases :math:`\beta`
    (``lora_bias``) and DoRA's gain G, where the adapters have them. Dropout is on the branch alone,
    also under DoRA: PEFT there drops inputs of W as well, which costs a second product with W and
    has the same mean.

    Args:
        layer: The adapted layer.
        x: ``(*batch, in)``.
        weight: W, ``(out, in)``.
        bias: b, ``(out,)``, or None.
        outputs: Which rows of B belong to ``weight``, where that is a part of the layer's.

    Returns:
        ``(*batch, out)``, of x's dtype.
    """
    if layer.rows is not None:
        return _linear_by_rows(layer, x, weight, bias, layer.rows)
    sole = layer.sole()
    if sole is not None and sole.has_magnitude:
        return _dora(layer, sole, x, weight, bias)
    branches, gain = layer.working()
    if outputs is not None:
        branches = [branch._replace(lora_B=branch.lora_B[outputs]) for branch in branches]
    if gain is None:
        y, branches = fused(x, weight, bias, branches[0]), branches[1:]
    else:
        y = ops.dora_scale(F.linear(x, weight), gain, bias)
    for branch in branches:
        y = y + (low_rank(x, branch) * branch.scaling).to(y.dtype)
    return y


def low_rank(x: Tensor, branch: Branch) -> Tensor:
    r"""Return :math:`\tilde x A^T B^T + \beta` by two products, in the factors' dtype."""
    dropped = F.dropout(x, branch.dropout_p) if branch.dropout_p > 0.0 else x
    hidden = F.linear(dropped.to(branch.lora_A.dtype), branch.lora_A)
    return F.linear(hidden, branch.lora_B, branch.bias)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch) -> Tensor:
    """Return base and branch by one op, with the branch's bias in the base's."""
    a, b, scaling, dropout_p, shift = branch
    if shift is not None:
        shift = scaling * shift
        bias = (shift if bias is None else bias + shift).to(x.dtype)
    seed = ops.draw_seed() if dropout_p > 0.0 else None
    return ops.lora_linear(x, weight, bias, a, b, scaling, dropout_p, seed)


def _dora(
    layer: NamedAdapters, slot: AdapterSlot, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """One DoRA alone: the gain scales base and branch together, as they come out of one op."""
    branch = layer.branch(slot)
    # layer.gain() would look up again what is here already.
    norms = ops.dora_row_norms(weight, branch.lora_A, branch.lora_B, branch.scaling)
    gain = dora.gain(slot.lora_magnitude, norms)
    return ops.dora_scale(fused(x, weight, None, branch), gain, bias)


def _linear_by_rows(
    layer: NamedAdapters, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows
) -> Tensor:
    slots, index = slots_of_rows(layer, rows), rows.numbers
    require_samples(x, rows)
    plain = all(slot.has_two_factors for slot in slots)
    shifted = not plain and any(slot.branch_bias is not None for slot in slots)
    scaled = not plain and any(slot.has_magnitude for slot in slots)
    apart = shifted or scaled
    factors = [slot.factors() for slot in slots]
    y = ops.lora_gather(
        x,
        weight,
        None if apart else bias,
        [a for a, _ in factors],
        [b for _, b in factors],
        [slot.scaling for slot in slots],
        index,
    )
    if not apart:
        return y
    dtype = y.dtype
    if shifted:
        none = torch.zeros_like(factors[0][1][:, 0])
        shifts = [none if s.branch_bias is None else s.branch_bias * s.scaling for s in slots]
        y = y + of_rows([none, *shifts], index, y)
    if scaled:
        y = y * of_rows(gains_of(layer, slots), index, y)
    return (y if bias is None else y + bias).to(dtype)


def slots_of_rows(layer: NamedAdapters, rows: Rows) -> list[AdapterSlot]:
    """Return the adapters that rows name.

    Raises:
        AdapterStateError: Training with dropout, of which there is no mask by rows.
    """
    own, further = layer.own_name, layer.further  # looked up once: there may be a name for each row
    slots = [layer if name == own else further[name] for name in rows.names]
    if layer.training and any(slot.dropout_p > 0.0 for slot in slots):
        raise AdapterStateError(
            f"a different adapter for each row has no dropout in training, at {rows.path!r}.",
            hint="Call model.eval(), or attach the adapters with dropout=0.",
        )
    return slots


def gains_of(layer: NamedAdapters, slots: list[AdapterSlot]) -> list[Tensor]:
    """Return the gain of no adapter, and of each."""
    found = [layer.gain(slot) if slot.has_magnitude else None for slot in slots]
    none = torch.ones_like(next(gain for gain in found if gain is not None))
    return [none, *(none if gain is None else gain for gain in found)]


def of_rows(table: list[Tensor], index: Tensor, y: Tensor, axis: int = -1) -> Tensor:
    """Return the entry of each row, of which the first is that of none, along an axis of y."""
    return along(torch.stack(table)[(index + 1).to(y.device)], y, axis)


def along(vectors: Tensor, y: Tensor, axis: int) -> Tensor:
    """Return ``(out,)``, or ``(rows, out)``, such that it broadcasts with y along ``axis`` < 0."""
    shape = [1] * y.dim()
    shape[axis] = vectors.shape[-1]
    if vectors.dim() == 2:
        shape[0] = len(vectors)
    return vectors.view(shape)
