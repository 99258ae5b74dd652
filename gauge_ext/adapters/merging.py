"""One weight out of a base and its update, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gauge_ext import ops
from gauge_ext.errors import NonFiniteError

_HALF = (torch.bfloat16, torch.float16)


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype that factors have beside a base of dtype ``base`` if nobody says another.

    Steps of a usual learning rate vanish in the 8 bits of a bfloat16 factor: float32 there.
    """
    return torch.float32 if base in _HALF else base


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 where one of ``dtypes`` is, else float32: what an update is summed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def add_update(
    weight: Tensor,
    delta: Tensor,
    parts: Mapping[str, Tensor],
    *,
    safe: bool,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ``weight + delta`` in weight's dtype, rounded to it once; ``delta`` is used up.

    Args:
        weight: W, ``(out, in)``.
        delta: The update, ``(out, in)``, in a dtype that holds W's exactly.
        parts: What the sum was made of, by name, for the message.
        safe: Refuse NaN and infinity.
        finish: What is done to the sum before it is rounded.

    Raises:
        NonFiniteError: A part or the sum holds NaN or infinity.
    """
    # Adding W in place keeps one (out, in) matrix in the wide dtype, and promotes W on the way.
    total = delta.add_(weight)
    merged = (total if finish is None else finish(total)).to(weight.dtype)
    if safe and not bool(merged.isfinite().all()):
        raise _not_finite(weight.dtype, parts)
    return merged


def add_product(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    parts: Mapping[str, Tensor],
    *,
    transposed: bool,
    safe: bool,
    in_place: bool = False,
) -> Tensor:
    """Return ``weight + scaling * lora_B @ lora_A`` as :func:`add_update` does, in one pass.

    Args:
        weight: W, ``(out, in)``, or ``(in, out)`` where ``transposed``; with the factors such that
            :func:`~gauge_ext.ops.merges_in_one_pass`.
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scaling: s.
        parts: What the sum is made of, by name, for the message.
        transposed: Whether W is transposed.
        safe: Refuse NaN and infinity.
        in_place: Write the sum into ``weight`` itself.

    Raises:
        NonFiniteError: A part or the sum holds NaN or infinity; where ``in_place``, it is there.
    """
    base = weight.detach()
    # Where it lies in memory the other way round, so shall the new one.
    flipped = weight.stride(1) != 1
    if in_place:
        merged = base
    elif flipped:
        merged = torch.empty_like(weight.mT, memory_format=torch.contiguous_format).mT
    else:
        merged = torch.empty_like(base)
    out = merged
    if flipped:
        out, base, transposed = merged.mT, base.mT, not transposed
    (sums,) = ops.merge_into(out, base, lora_A, lora_B, scaling, transposed=transposed)
    if safe and not sums.finite:
        raise _not_finite(weight.dtype, parts)
    return merged


def surely_finite(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> bool:
    r"""Say whether ``weight + scaling * lora_B @ lora_A`` can hold neither NaN nor infinity.

    By a bound, for which weight and factors are read once and nothing is computed:
    :math:`\max|W| + |s| \max_i \sum_k |B_{ik}| \max|A|`, however the product is laid out. False
    says nothing: the sum may be finite all the same.

    Args:
        weight: W, of any shape.
        lora_A: Its rows are the directions.
        lora_B: Its columns are.
        scaling: s.
    """
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in (weight, lora_A, lora_B)):
        return False  # a subclass (quantised, distributed) knows best itself how it is read
    if not (weight.numel() and lora_A.numel() and lora_B.numel()):
        return False
    rows = lora_B.flatten(1).double().abs().sum(1).max()
    update = abs(scaling) * rows * _largest(lora_A).double()
    # Half of the range leaves room for every rounding. NaN is not less than anything.
    return bool(_largest(weight).double() + update < torch.finfo(weight.dtype).max / 2)


def _largest(t: Tensor) -> Tensor:
    """Return max |t|, NaN where there is one, without a copy of t."""
    low, high = torch.aminmax(t)
    return torch.maximum(-low, high)


def _not_finite(dtype: torch.dtype, parts: Mapping[str, Tensor]) -> NonFiniteError:
    for name, part in parts.items():
        if not bool(part.isfinite().all()):
            return NonFiniteError(f"{name} holds NaN or infinity.")
    return NonFiniteError(f"weight plus its update exceeds the range of {dtype}.")
