"""How near a result is to what was computed by hand in float64."""

from __future__ import annotations

from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail where a number errs by more than ``tolerance`` times the largest expected one."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 1.0
    error = (actual.cpu().double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), f"{error:.2e} against {scale:.2e}"
