"""How a factor is stored: in float32, in float16, or in int8 with a scale a component."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

AdapterPrecision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[AdapterPrecision, ...] = get_args(AdapterPrecision)


def encode(
    matrix: NDArray[Any], precision: AdapterPrecision, axis: int
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Store a factor: as it is, rounded to float16, or as int8 codes with a scale a component.

    int8 is symmetric absmax: ``scale = max|m| / 127`` over each of the r components,
    ``code = round(m / scale)``.

    Args:
        matrix: A ``(in, r)`` or B ``(r, out)``.
        precision: How.
        axis: The axis that is r.

    Returns:
        The codes ``(in, r)`` or ``(r, out)``, and for int8 the scales ``(r,)``, else None.
    """
    if precision != "int8":
        with np.errstate(over="ignore"):  # what overflows is reported by name
            return np.ascontiguousarray(matrix.astype(precision)), None
    wide = matrix.astype(np.float64)
    peak = np.abs(wide).max(axis=1 - axis, initial=0.0)
    scale = np.where(peak > 0.0, peak / 127.0, 1.0).astype(np.float32)
    codes = np.rint(wide / np.expand_dims(scale.astype(np.float64), 1 - axis))
    return np.ascontiguousarray(codes.clip(-127, 127).astype(np.int8)), scale


def decode(codes: NDArray[Any], scale: NDArray[Any] | None, axis: int) -> NDArray[np.float64]:
    """Read a factor that :func:`encode` stored, in float64."""
    wide = codes.astype(np.float64)
    return wide if scale is None else wide * np.expand_dims(scale.astype(np.float64), 1 - axis)
