"""The Python face of ``torch.ops.gauge_ext.lora_linear_group``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.lora_linear import lora_linear
from gauge_ext.ops.meta import require_values

# The schema that csrc/ops/lora_linear_group.cpp registers; needed where nothing is compiled.
_SCHEMA = (
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, "
    "Tensor[] lora_Bs, float[] scalings, float dropout_p, Tensor[] seeds) -> Tensor[]"
)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor] = (),
) -> list[Tensor]:
    r"""Apply several adapted linear layers to one input: query, key and value, or gate and up.

    .. math:: y_i = x W_i^T + b_i + s_i\,(x \circ M_i / (1 - p))\, A_i^T B_i^T

    Each :math:`y_i` is what :func:`~gauge_ext.ops.lora_linear` returns for the member, with the
    same mask for the same seed. On the CPU, x is kept for the backward pass once, and its gradient
    is summed up over the members in one tensor, in float32 or wider, where separate layers would
    write one each and add them up afterwards. On CUDA, members that share a mask share the passes
    over x, and their products are added to one gradient of x in its own dtype. On other devices the
    members run one by one.

    Args:
        x: ``(*batch, in)``; see :func:`~gauge_ext.ops.lora_linear` for dtypes.
        weights: ``(out_i, in)`` each, of x's dtype; at least one.
        biases: ``(out_i)`` each, of x's dtype, or None.
        lora_As: ``(r_i, in)`` each, of x's dtype or float32; ranks may differ.
        lora_Bs: ``(out_i, r_i)`` each, of the dtype of the member's A.
        scalings: s_i.
        dropout_p: p, the same for all.
        seeds: ``()`` int64 each, one for each member, or a single one for all of them, who then
            share their mask; may be empty where ``dropout_p`` is 0.

    Returns:
        One ``(*batch, out_i)`` for each member, of x's dtype.

    Raises:
        RuntimeError: The lists differ in length, or a shape, dtype or device does not fit; the
            message names the argument, what was expected and what came.
    """
    has_kernels = x.is_cpu or x.is_meta or (x.is_cuda and _load.load().cuda)
    if has_kernels and torch._C._get_tracing_state() is None:
        call = (x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds)
        return cast("list[Tensor]", _op(*call))
    return [
        lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        for weight, bias, lora_A, lora_B, scaling, seed in reference.group_members(
            weights, biases, lora_As, lora_Bs, scalings, seeds
        )
    ]


def _fake_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    require_values(x, *weights, *biases, *lora_As, *lora_Bs)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seeds: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])
    return (
        _fake_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds),
        [x.new_empty((rows, lora_A.shape[0]), dtype=wide) for lora_A in lora_As],
    )


def _fake_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    hiddens: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs_x: bool,
    needs_factors: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def wanted(needed: bool, like: Tensor) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    return (
        wanted(needs_x, x),
        [wanted(needs_factors, lora_A) for lora_A in lora_As],
        [wanted(needs_factors, lora_B) for lora_B in lora_Bs],
    )


def _register_compiled() -> None:
    """Tells torch.compile and torch.export what the compiled ops return."""
    for name, fake in (
        ("lora_linear_group_forward", _fake_forward),
        ("lora_linear_group_backward", _fake_backward),
    ):
        torch.library.register_fake(f"gauge_ext::{name}", fake)
    op = torch.ops.gauge_ext.lora_linear_group.default
    register_traced(op, _fake_group, reference.lora_linear_group)


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("lora_linear_group", reference.lora_linear_group, "CompositeImplicitAutograd")
    return library


if _load.load().compiled:
    _register_compiled()
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.lora_linear_group.default
