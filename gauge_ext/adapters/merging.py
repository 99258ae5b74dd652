"""One weight out of a base and its update, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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
        for name, part in parts.items():
            if not bool(part.isfinite().all()):
                raise NonFiniteError(f"{name} holds NaN or infinity.")
        raise NonFiniteError(f"weight plus its update exceeds the range of {weight.dtype}.")
    return merged
