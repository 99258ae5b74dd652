"""Rows of blocks, changed and rounded to codes again with as little loss as possible.

A changed block gets either its old scale and zero point or new ones that span its values,
whichever errs less in the sum of squares: a block that the update does not touch stays as it is,
code by code.

The formulas stand here in numpy. They are what the compiled loops of ``csrc/blocks`` are tested
against, which take a thirtieth of the time, and what runs where nothing is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from gauge_ext.export.disk.numbers import Array
from gauge_ext.export.patching.update import LowRank

if TYPE_CHECKING:
    from gauge_ext.export.patching.nbits import Quantized


@dataclass(frozen=True)
class Sums:
    """What changing rows did, summed over their numbers, padding included.

    Attributes:
        error: ``‖stored - V‖²``, V as it should be.
        moved: ``‖V - W‖²``, W as it was stored before.
        total: ``‖V‖²``.
        finite: Whether all of V is; if not, the rest means nothing.
    """

    error: float = 0.0
    moved: float = 0.0
    total: float = 0.0
    finite: bool = True

    def __add__(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(
            self.error + other.error,
            self.moved + other.moved,
            self.total + other.total,
            self.finite and other.finite,
        )


def change_rows(
    native: ModuleType, weight: Quantized, update: LowRank, raw: list[Array], start: int
) -> Sums:
    """Adds an update to rows, in place, by the compiled loops.

    Args:
        native: The compiled module.
        weight: The weight that the rows are of.
        update: All of it, in float32.
        raw: The rows of each of ``weight.parts``, ``(rows, bytes)``; overwritten.
        start: The number of the first row.
    """
    blocks, rows = weight.blocks, slice(start, start + len(raw[0]))
    magnitude = update.magnitude
    return Sums(
        *native.requantize_rows(
            codes=raw[0],
            scales=raw[1],
            zero_points=raw[2] if len(raw) > 2 else None,
            left=update.left[rows],
            right=update.right,
            magnitude=None if magnitude is None else magnitude[rows],
            bits=blocks.bits,
            block_size=blocks.size,
            scale_format=weight.number.name,
            packed_zero_points=weight.packed,
        )
    )


@np.errstate(invalid="ignore", over="ignore")  # told by what is returned
def change_rows_in_numpy(weight: Quantized, update: LowRank, raw: list[Array], start: int) -> Sums:
    """Does what :func:`change_rows` does, a whole array at a time."""
    codes, scales, zero = weight.decode(raw)
    wanted = (codes - zero) * scales
    flat = wanted.reshape(len(codes), -1)[:, : weight.blocks.columns]
    change = -flat
    flat += update.rows(start, start + len(codes))
    update.rescale(flat, start)
    change += flat
    if not np.isfinite(wanted).all():
        return Sums(finite=False)
    codes, scales, zero, lost = _round_to_codes(weight, wanted, scales, zero)
    for rows, content in zip(raw, weight.encode(codes, scales, zero), strict=True):
        rows[:] = content
    return Sums(lost, float(np.vdot(change, change)), float(np.vdot(wanted, wanted)))


def _round_to_codes(
    weight: Quantized, wanted: Array, scales: Array, zero: Array
) -> tuple[Array, Array, Array, float]:
    """Codes, scales and zero points that err least among the old and the new, and the error."""
    top = 2**weight.blocks.bits - 1
    fresh, fresh_zero = _span_values(weight, wanted)
    codes, errors = _round(wanted, scales, zero, top)
    new_codes, new_errors = _round(wanted, fresh, fresh_zero, top)
    better = new_errors < errors
    return (
        np.where(better, new_codes, codes),
        np.where(better, fresh, scales),
        np.where(better, fresh_zero, zero),
        float(np.where(better, new_errors, errors).sum(dtype="<f8")),
    )


def _round(wanted: Array, scales: Array, zero: Array, top: int) -> tuple[Array, Array]:
    steps = wanted / np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(steps + zero), 0, top)
    difference = (codes - zero) * scales - wanted
    errors = np.einsum("rbk,rbk->rb", difference, difference)[..., None]
    return codes.astype("u1"), errors


def _span_values(weight: Quantized, wanted: Array) -> tuple[Array, Array]:
    """Scales and zero points with which each block's values just fit, as they will be stored."""
    bits = weight.blocks.bits
    middle = np.float32(2 ** (bits - 1))
    low, high = wanted.min(-1, keepdims=True), wanted.max(-1, keepdims=True)
    if weight.zero_points is None:
        # The largest value in magnitude is -middle steps away from zero, where there is one more.
        scales = np.where(-low > high, low, high) / -middle
        zero = np.full_like(scales, middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = (high - low) / np.float32(2**bits - 1)
        zero = np.rint(-low / np.where(scales == 0, np.float32(1), scales))
        zero = np.clip(zero, 0, 2**bits - 1)
    return weight.number.decode(weight.number.encode(scales.astype("<f4"))), zero.astype("<f4")
