"""``W + s·B·A`` from one file into another, some rows at a time; DoRA gives it its lengths back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gauge_ext.errors import NonFiniteError
from gauge_ext.export.disk.numbers import Array, Number
from gauge_ext.export.disk.spans import CHUNK, Span, opened, read_into, write_all

_ONE_THREAD = 2**18  # multiplications: SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD in OpenBLAS


@dataclass(frozen=True)
class Place:
    """Where something is to be written.

    Attributes:
        path: A file that exists.
        offset: The first byte.
    """

    path: Path
    offset: int


LayerKind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class WeightShape:
    """What an adapter is for.

    Attributes:
        matrix: ``(out, in)``; of a convolution ``(out, in · kernel)``.
        kind: Of the layer.
        kernel: Of a convolution.
    """

    matrix: tuple[int, int]
    kind: LayerKind = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """As torch stores it; linear layers of another make may lie the other way round."""
        out, size = self.matrix
        if self.kind == "embedding":
            return size, out
        area = int(np.prod(self.kernel)) if self.kernel else 1
        return out, size // area, *self.kernel


@dataclass(frozen=True)
class LowRank:
    """An update in the layout of the stored weight: ``left @ right``.

    Attributes:
        left: ``(rows, r)``; the scaling is in it.
        right: ``(r, columns)``.
        magnitude: DoRA's m, the length that each output's part of the sum is given; None for none.
        by_rows: Whether that is a row, or a column.
    """

    left: Array
    right: Array
    magnitude: Array | None = None
    by_rows: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.left.shape[0], self.right.shape[1]

    def astype(self, dtype: np.dtype[Any]) -> LowRank:
        """The same update in the dtype that it is computed in."""
        left, right = (np.ascontiguousarray(part, dtype) for part in (self.left, self.right))
        return LowRank(left, right, self.magnitude, self.by_rows)

    @property
    def transposed(self) -> LowRank:
        """The same update for a weight that is stored ``(in, out)``."""
        return LowRank(self.right.T, self.left.T, self.magnitude, not self.by_rows)

    @property
    def needs_columns(self) -> bool:
        """Whether the length of whole columns has to be known before any number can be written."""
        return self.magnitude is not None and not self.by_rows

    def rescale(self, total: Array, start: int, squares: Array | None = None) -> None:
        """Gives rows of ``W + s·B·A``, in place, the lengths that DoRA wants.

        Args:
            total: The rows.
            start: The number of the first.
            squares: The squared lengths of the columns, where :attr:`needs_columns`.
        """
        if self.magnitude is None:
            return
        wanted = self.magnitude
        if self.by_rows:
            wanted = wanted[start : start + len(total)]
            squares = np.einsum("ij,ij->i", total, total, dtype="<f8")
        assert squares is not None
        squares = np.where(squares > 0, squares, np.inf)  # zeros stay zeros
        gain = (wanted / np.sqrt(squares)).astype(total.dtype)
        total *= gain[:, None] if self.by_rows else gain

    def rows(self, start: int, stop: int) -> Array:
        """Some rows of the update."""
        left, right = self.left[start:stop], self.right
        out = np.empty((len(left), right.shape[1]), np.result_type(left, right))
        product(left, right, out)
        return out


def product(left: Array, right: Array, out: Array) -> None:
    """``out[:] = left @ right``, in pieces that OpenBLAS computes on one thread.

    Its threads wait for each other by spinning, which makes a product of so low a rank many times
    slower on a busy machine, and no faster on an idle one: the disk is slower than a thread.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    area = max(1, _ONE_THREAD // rank)
    wide = columns if area >= 4 * columns else max(64, area // 16)
    high = max(1, area // wide)
    for column in range(0, columns, wide):
        part = right[:, column : column + wide]
        for row in range(0, rows, high):
            piece = out[row : row + high, column : column + wide]
            np.matmul(left[row : row + high], part, out=piece)


def row_blocks(rows: int, columns: int, itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of blocks that are about a chunk in the wide dtype."""
    step = max(1, CHUNK // max(1, itemsize * columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def add_update(name: str, source: Span, number: Number, update: LowRank, target: Place) -> None:
    """Writes a weight plus its update; the sum is rounded once.

    Args:
        name: What errors call the weight.
        source: Where the weight lies, row by row.
        number: Its format, kept.
        update: What is added.
        target: Where the sum goes.

    Raises:
        NonFiniteError: the weight holds NaN or infinity, or the sum exceeds its format.
        OSError: a file cannot be read or written.
    """
    rows, columns = update.shape
    wide = number.wide
    update = update.astype(wide)
    step = next((stop - start for start, stop in row_blocks(rows, columns, wide.itemsize)), 0)
    stored = np.empty((step, columns), number.stored)
    total = np.empty((step, columns), wide)

    def summed(reader: int, start: int, stop: int) -> Array:
        weight, merged = stored[: stop - start], total[: stop - start]
        at = source.offset + start * columns * number.itemsize
        read_into(reader, at, weight.data.cast("B"))
        product(update.left[start:stop], update.right, merged)
        merged += number.decode(weight)
        return merged

    blocks = list(row_blocks(rows, columns, wide.itemsize))
    squares = None
    with opened(source.path) as reader, opened(target.path, os.O_RDWR) as writer:
        if update.needs_columns:
            squares = np.zeros(columns)
            for start, stop in blocks:
                merged = summed(reader, start, stop)
                squares += np.einsum("ij,ij->j", merged, merged, dtype="<f8")
        for start, stop in blocks:
            merged = summed(reader, start, stop)
            update.rescale(merged, start, squares)
            # NaN passes through both; this needs no memory, unlike isfinite.
            if not (-number.limit < merged.min() and merged.max() < number.limit):
                raise _not_finite(name, number, number.decode(stored[: stop - start]))
            at = target.offset + start * columns * number.itemsize
            write_all(writer, at, number.encode(merged).data.cast("B"))


def _not_finite(name: str, number: Number, weight: Array) -> NonFiniteError:
    if not np.isfinite(weight).all():
        return NonFiniteError(f"{name} holds NaN or infinity.", hint="Nothing was written.")
    return NonFiniteError(
        f"{name} plus its update exceeds the range of {number.name}.", hint="Nothing was written."
    )
