"""Block-quantized weights in files: read some rows at a time, changed, and written.

``com.microsoft.MatMulNBits`` stores W ``(N, K)`` as codes q in blocks along K, with a scale s and a
zero point z for each block: ``W = (q - z) s``, z = 2^(bits-1) where none is given. How changed
blocks are rounded to codes is said in :mod:`block_rounding`.

Source: onnxruntime, docs/ContribOperators.md, MatMulNBits.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from gauge_ext import _native
from gauge_ext.errors import ConfigError, NonFiniteError
from gauge_ext.export.disk.numbers import BY_ONNX, Array, Number
from gauge_ext.export.disk.onnx_file import OnnxFile, StoredTensor
from gauge_ext.export.disk.spans import opened, read_into, write_all
from gauge_ext.export.patching.block_rounding import Sums, change_rows, change_rows_in_numpy
from gauge_ext.export.patching.sites import Blocks, Site
from gauge_ext.export.patching.update import LowRank, Place, row_blocks

_UINT8 = 2


@dataclass(frozen=True)
class Loss:
    """What rounding to codes cost.

    Attributes:
        of_update: ``‖stored - (W + ΔW)‖ / ‖ΔW‖``, Frobenius norms, W as it was stored before.
        of_weight: The same over ``‖W + ΔW‖``.
    """

    of_update: float
    of_weight: float


@dataclass(frozen=True)
class Quantized:
    """A block-quantized weight in a file.

    Attributes:
        blocks: Its layout.
        codes: Its codes, ``(N, blocks, bytes)``.
        scales: ``N * blocks`` scales.
        zero_points: The zero points, packed as the codes or in the format of the scales; or None.
        number: The format of the scales.
    """

    blocks: Blocks
    codes: StoredTensor
    scales: StoredTensor
    zero_points: StoredTensor | None
    number: Number

    @property
    def parts(self) -> list[StoredTensor]:
        """The tensors that a change writes."""
        return [self.codes, self.scales, *([self.zero_points] if self.zero_points else [])]

    @property
    def count(self) -> int:
        """Blocks in a row."""
        return -(-self.blocks.columns // self.blocks.size)

    @property
    def packed(self) -> bool:
        """Whether zero points are codes themselves."""
        return self.zero_points is not None and self.zero_points.data_type == _UINT8

    @property
    def row_bytes(self) -> list[int]:
        """Bytes of one row in each of ``parts``."""
        bits, n = self.blocks.bits, self.count
        zero = (n * bits + 7) // 8 if self.packed else n * self.number.itemsize
        both = [n * self.blocks.size * bits // 8, n * self.number.itemsize]
        return [*both, zero] if self.zero_points else both

    def decode(self, raw: list[Array]) -> tuple[Array, Array, Array]:
        """Codes ``(rows, blocks, size)``, scales and zero points ``(rows, blocks, 1)`` of rows."""
        rows, n, bits = len(raw[0]), self.count, self.blocks.bits
        codes = _unpack(raw[0], bits).reshape(rows, n, self.blocks.size)
        scales = self.number.decode(raw[1].view(self.number.stored)).reshape(rows, n, 1)
        middle = np.float32(2 ** (bits - 1))
        if self.zero_points is None:
            zero = np.full_like(scales, middle)
        elif self.packed:
            zero = _unpack(raw[2], bits)[:, :n].reshape(rows, n, 1).astype("<f4")
        else:
            zero = self.number.decode(raw[2].view(self.number.stored)).reshape(rows, n, 1)
        return codes, scales, zero

    def encode(self, codes: Array, scales: Array, zero: Array) -> list[Array]:
        """The bytes of rows, as :meth:`decode` took them."""
        rows, bits = len(codes), self.blocks.bits
        out = [
            _pack(codes.reshape(rows, -1), bits),
            self.number.encode(np.ascontiguousarray(scales)).view("u1").reshape(rows, -1),
        ]
        if self.packed:
            out.append(_pack(zero.reshape(rows, -1).astype("u1"), bits))
        elif self.zero_points is not None:
            out.append(self.number.encode(np.ascontiguousarray(zero)).view("u1").reshape(rows, -1))
        return out

    def values(self, raw: list[Array]) -> Array:
        """The weight's rows ``(rows, K)`` in float32."""
        codes, scales, zero = self.decode(raw)
        values = (codes - zero) * scales
        found: Array = values.reshape(len(codes), -1)[:, : self.blocks.columns]
        return found


def quantized_weight(file: OnnxFile, site: Site) -> Quantized:
    """The stored form of a site's weight.

    Raises:
        ConfigError: it cannot be changed, or its tensors do not fit each other.
    """
    assert site.blocks is not None
    blocks = site.blocks
    codes, scales = file.initializers[site.tensor], file.initializers[blocks.scales]
    zero = file.initializers[blocks.zero_points] if blocks.zero_points else None
    if blocks.reason is not None:
        raise ConfigError(f"{site.node} in {file.path} cannot be changed: {blocks.reason}.")
    number = BY_ONNX.get(scales.data_type)
    if number is None or number.wide != np.dtype("<f4"):
        raise ConfigError(f"the scales of {site.node} in {file.path} are no float32 or float16.")
    if zero is not None and zero.data_type not in {_UINT8, scales.data_type}:
        raise ConfigError(f"the zero points of {site.node} in {file.path} are of an odd type.")
    found = Quantized(blocks, codes, scales, zero, number)
    for part, row in zip(found.parts, found.row_bytes, strict=True):
        if part.nbytes != row * blocks.rows:
            raise ConfigError(
                f"{part.name!r} in {file.path} takes {part.nbytes:,} bytes, and {site.node} says "
                f"{row * blocks.rows:,} (N={blocks.rows}, K={blocks.columns}, "
                f"block_size={blocks.size}, bits={blocks.bits})."
            )
    return found


def read_rows(weight: Quantized, handles: list[int], start: int, stop: int) -> list[Array]:
    """The bytes of some rows of each part, ``(rows, bytes)``."""
    raw = []
    for handle, part, row in zip(handles, weight.parts, weight.row_bytes, strict=True):
        assert part.span is not None
        content = np.empty((stop - start, row), "u1")
        read_into(handle, part.span.offset + start * row, content.data.cast("B"))
        raw.append(content)
    return raw


def requantize(name: str, weight: Quantized, update: LowRank, targets: list[Place]) -> Loss:
    """Writes codes, scales and zero points of ``W + ΔW``.

    Args:
        name: What errors call the weight.
        weight: The weight.
        update: ΔW, ``(N, K)``.
        targets: Where each of ``weight.parts`` goes.

    Returns:
        What was lost.

    Raises:
        NonFiniteError: the weight or the sum holds NaN or infinity.
    """
    update = update.astype(np.dtype("<f4"))
    native = _native.load()
    # What of a row is in work at once: in numpy several arrays of decoded numbers; in compiled code
    # a part of what is stored, and A is put in order anew for every few rows.
    width = 16 * weight.count * weight.blocks.size if native is None else sum(weight.row_bytes) // 4
    sums = Sums()
    with ExitStack() as stack:
        spans = [part.span for part in weight.parts if part.span is not None]
        readers = [stack.enter_context(opened(span.path)) for span in spans]
        writers = [stack.enter_context(opened(target.path, os.O_RDWR)) for target in targets]
        for start, stop in row_blocks(weight.blocks.rows, width, 1):
            raw = read_rows(weight, readers, start, stop)
            if native is None:
                sums += change_rows_in_numpy(weight, update, raw, start)
            else:
                sums += change_rows(native, weight, update, raw, start)
            if not sums.finite:
                raise NonFiniteError(
                    f"{name} or its sum with the update holds NaN or infinity.",
                    hint="Nothing was written.",
                )
            for writer, target, row, content in zip(
                writers, targets, weight.row_bytes, raw, strict=True
            ):
                write_all(writer, target.offset + start * row, content.data.cast("B"))
    return Loss(_root(sums.error, sums.moved), _root(sums.error, sums.total))


def _root(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0


def _unpack(raw: Array, bits: int) -> Array:
    """Bytes -> codes, the low half first."""
    if bits == 8:
        return raw
    out = np.empty((*raw.shape[:-1], raw.shape[-1] * 2), "u1")
    out[..., 0::2] = raw & 15
    out[..., 1::2] = raw >> 4
    return out


def _pack(codes: Array, bits: int) -> Array:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), "u1")], axis=-1)
    packed: Array = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed
