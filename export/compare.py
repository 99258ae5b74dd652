"""One output of onnxruntime against the same output of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.export.report import OutputDifference
from gauge_ext.export.tolerance import Tolerance

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def compare(
    name: str, expected: Tensor, actual: Tensor, tolerance: Tolerance, *, logits: bool = False
) -> OutputDifference:
    """Measures how far ``actual`` is from ``expected`` and judges it.

    NaN and infinities have to sit at the same places with the same sign; everything else is
    measured over the entries that are finite in both, in float64.

    Args:
        name: The output's name.
        expected: What torch computed, any shape and dtype, on the CPU.
        actual: What onnxruntime computed.
        tolerance: The bar; not applied to integers and booleans, which have to be equal.
        logits: Whether the last axis holds scores of alternatives, so that top-1 makes sense.

    Returns:
        The numbers and the verdict.
    """
    shape = tuple(expected.shape)
    dtype = str(expected.dtype).removeprefix("torch.")

    def verdict(
        reason: str | None,
        max_abs: float = float("nan"),
        relative: float = float("nan"),
        cosine: float | None = None,
        top1: float | None = None,
        limit: float = 0.0,
    ) -> OutputDifference:
        return OutputDifference(
            name, dtype, shape, max_abs, relative, cosine, top1, limit, reason is None, reason
        )

    if tuple(actual.shape) != shape:
        return verdict(f"has shape {tuple(actual.shape)}, torch's is {shape}")
    if actual.dtype != expected.dtype:
        return verdict(f"is {actual.dtype}, torch's is {expected.dtype}")
    exact = expected.dtype in _INTEGERS
    y, z = expected.double(), actual.double()
    odd = int((_marks(y) != _marks(z)).sum())
    finite = y.isfinite() & z.isfinite()
    y, z = y[finite], z[finite]
    max_abs = float((z - y).abs().max()) if y.numel() else 0.0
    peak = float(y.abs().max()) if y.numel() else 0.0
    relative = max_abs / peak if peak else (0.0 if max_abs == 0.0 else float("inf"))
    limit = 0.0 if exact else tolerance.limit(peak)
    cosine = None if exact else _cosine(y, z, tolerance.absolute)
    top1 = _top1(expected, actual) if logits and not exact else None

    reason = None
    if odd:
        reason = f"NaN or infinity in one and not in the other, at {odd} entries"
    elif max_abs > limit:
        reason = (
            f"{'integers differ' if exact else 'max abs'} {max_abs:.3e} > {limit:.3e} "
            f"(largest entry {peak:.3e})"
        )
    elif cosine is not None and cosine < tolerance.cosine:
        reason = f"cosine {cosine:.8f} < {tolerance.cosine:.8f}"
    elif top1 is not None and top1 < tolerance.top1:
        reason = f"top-1 agreement {top1:.2%} < {tolerance.top1:.2%}"
    return verdict(reason, max_abs, relative, cosine, top1, limit)


def _marks(values: Tensor) -> Tensor:
    """0 where finite, 1 and -1 for the infinities, 2 for NaN."""
    marks = values.isposinf().to(torch.int8) - values.isneginf().to(torch.int8)
    return marks + 2 * values.isnan().to(torch.int8)


def _cosine(y: Tensor, z: Tensor, noise: float) -> float | None:
    # Below the noise floor the direction is made of rounding errors and means nothing.
    if not y.numel() or float(y.square().mean().sqrt()) <= noise:
        return None
    norms = float(y.norm() * z.norm())
    # Rounding can push the quotient of equal vectors beyond one.
    return min(1.0, max(-1.0, float(y @ z) / norms)) if norms else 0.0


def _top1(expected: Tensor, actual: Tensor) -> float | None:
    """The share of rows in which the largest entry stays the largest.

    Entries that are equal but for rounding are a tie, and either may win: what counts is whether
    the entry that onnxruntime chose is, in torch's row, within rounding of the maximum. The window
    comes from the dtype and not from the user's tolerance, so that a loose tolerance does not hide
    flipped answers.
    """
    y, z = expected.double(), actual.double()
    if not y.numel() or y.dim() == 0:
        return None
    chosen = y.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
    best = y.amax(-1)
    usual = Tolerance.for_dtype(expected.dtype)
    window = 2 * (usual.absolute + usual.relative * best.abs())
    # Equality first: the difference of two infinities is NaN.
    agrees = (chosen == best) | (best - chosen <= window)
    return float(agrees[~best.isnan()].double().mean()) if not best.isnan().all() else None
