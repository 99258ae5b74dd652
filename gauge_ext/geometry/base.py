"""Tangent vectors of the base, the m x n matrices: dense, or as a product of two factors."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.linalg import to_double
from gauge_ext.geometry.point import LoRAPoint

BaseVector: TypeAlias = Tensor | LoRAPoint
"""Z: a dense ``(*batch, m, n)`` tensor, or a pair of any inner size whose product is Z."""


def require_base_vector(point: LoRAPoint, z: BaseVector) -> None:
    """Refuse a vector that is no m x n matrix for each point of the batch.

    Raises:
        GeometryError: Its shape is not ``(*batch, m, n)``.
    """
    expected = (*point.batch_shape, *point.shape)
    got = (*z.batch_shape, *z.shape) if isinstance(z, LoRAPoint) else tuple(z.shape)
    if got != expected:
        raise GeometryError(f"a tangent vector of the base must have shape {expected}, got {got}.")


def left_apply(y: Tensor, z: BaseVector) -> Tensor:
    """Y Z ``(*batch, k, n)`` in float64, for Y ``(*batch, k, m)``."""
    y = to_double(y)
    if isinstance(z, LoRAPoint):
        return (y @ to_double(z.B)) @ to_double(z.A)
    return y @ to_double(z)


def right_apply(z: BaseVector, y: Tensor) -> Tensor:
    """Z Y ``(*batch, m, k)`` in float64, for Y ``(*batch, n, k)``."""
    y = to_double(y)
    if isinstance(z, LoRAPoint):
        return to_double(z.B) @ (to_double(z.A) @ y)
    return to_double(z) @ y
