"""The floating-point formats of weights in files, as arrays to compute with and back.

Sums are taken in float32 (float64 for float64) and rounded once, to nearest even, when they are
stored. numpy has no bfloat16: it is the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Number:
    """A floating-point format.

    Attributes:
        name: What torch and numpy call it.
        stored: The dtype of its bytes in numpy.
        wide: The dtype that sums are taken in.
        limit: The least magnitude that rounds to infinity.
        decode: Stored -> wide.
        encode: Wide -> stored.
    """

    name: str
    stored: np.dtype[Any]
    wide: np.dtype[Any]
    limit: float
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.stored.itemsize


def _widen_bfloat16(stored: Array) -> Array:
    wide = stored.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def _round_to_bfloat16(wide: Array) -> Array:
    bits = wide.view("<u4")
    # Half a unit more, less one where the kept part is even: ties go to even.
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    return odd.astype("<u2")


def _as_is(array: Array) -> Array:
    return array


_F32, _F64 = np.dtype("<f4"), np.dtype("<f8")
FLOAT32 = Number("float32", _F32, _F32, float("inf"), _as_is, _as_is)
FLOAT64 = Number("float64", _F64, _F64, float("inf"), _as_is, _as_is)
FLOAT16 = Number(
    "float16",
    np.dtype("<f2"),
    _F32,
    65520.0,
    lambda stored: stored.astype(_F32),
    lambda wide: wide.astype("<f2"),
)
BFLOAT16 = Number(
    "bfloat16",
    np.dtype("<u2"),
    _F32,
    float.fromhex("0x1.ffp127"),
    _widen_bfloat16,
    _round_to_bfloat16,
)

BY_SAFETENSORS = {"F32": FLOAT32, "F64": FLOAT64, "F16": FLOAT16, "BF16": BFLOAT16}
BY_ONNX = {1: FLOAT32, 11: FLOAT64, 10: FLOAT16, 16: BFLOAT16}
