"""What storing an adapter in fewer bits would cost, by format and by gauge.

The update is the same in every gauge; what rounding its factors does to it is not. Nothing is
predicted here: the factors are rounded, and the distance of the two updates is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError
from gauge_ext.geometry import GaugeName, LoRAPoint, frobenius_distance, to_gauge

#: The gauges that are tried beside the factors as they are stored.
TRIED: tuple[GaugeName, ...] = ("svd", "balanced", "equal_energy")
STORED = "stored"


@dataclass(frozen=True)
class RoundingErrors:
    r"""The error of one layer in each gauge, :math:`\|X' - X\|_F / \|X\|_F`, for one format.

    Attributes:
        format: One of :data:`FORMATS`.
        errors: Gauge ("stored", or one of :data:`TRIED`) -> error; infinity where a number leaves
            the format's range; 0 for an update of zeros.
    """

    format: str
    errors: Mapping[str, float]

    @property
    def best(self) -> str:
        """The gauge of the least error; "stored" where no other is better."""
        return min(self.errors, key=self.errors.__getitem__)


def _cast(dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    return lambda factor, component: factor.to(dtype).to(torch.float64)


def _integers(bits: int, *, by_component: bool) -> Callable[[Tensor, int], Tensor]:
    """Symmetric integers whose scale is the largest entry over 2^(bits-1) - 1."""
    levels = 2 ** (bits - 1) - 1

    def rounded(factor: Tensor, component: int) -> Tensor:
        largest = factor.abs().amax(1 - component, keepdim=True) if by_component else factor.abs()
        scale = (largest if by_component else largest.max()) / levels
        return torch.where(scale > 0, (factor / scale).round() * scale, 0.0)

    return rounded


#: Format -> how a factor is rounded to it. "component": one scale for each b_i and each a_i.
FORMATS: Mapping[str, Callable[[Tensor, int], Tensor]] = MappingProxyType(
    {
        "bfloat16": _cast(torch.bfloat16),
        "float16": _cast(torch.float16),
        "int8, one scale": _integers(8, by_component=False),
        "int8 by component": _integers(8, by_component=True),
        "int4 by component": _integers(4, by_component=True),
    }
)


def rounding_error(point: LoRAPoint, format_name: str) -> float:
    r"""Round both factors to a format and measure :math:`\|B'A' - BA\|_F / \|BA\|_F`.

    Args:
        point: (B, A), without batch dimensions.
        format_name: One of :data:`FORMATS`.

    Returns:
        The error: 0 for an update of zeros, infinity where a factor leaves the format's range.

    Raises:
        ConfigError: There is no such format.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}.")
    exact = point.to(torch.float64)
    norm = float(exact.singular_values().norm())
    if norm == 0.0:
        return 0.0
    round_to = FORMATS[format_name]
    b, a = round_to(exact.B, 1), round_to(exact.A, 0)
    if not bool(b.isfinite().all() and a.isfinite().all()):
        return math.inf
    return float(frobenius_distance(LoRAPoint(b, a), exact)) / norm


def rounding_errors(point: LoRAPoint) -> tuple[RoundingErrors, ...]:
    """Measure every format in every gauge; O((m + n) r²) each.

    Args:
        point: (B, A) as stored, without batch dimensions, at full precision.
    """
    exact = point.to(torch.float64)
    points = {STORED: exact} | {name: to_gauge(exact, name).point for name in TRIED}
    return tuple(
        RoundingErrors(name, {gauge: rounding_error(at, name) for gauge, at in points.items()})
        for name in FORMATS
    )
