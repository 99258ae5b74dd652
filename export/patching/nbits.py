"""Block-quantized weights: decoded, changed, and encoded again with as little loss as possible.

``com.microsoft.MatMulNBits`` stores W ``(N, K)`` as codes q in blocks along K, with a scale s and a
zero point z for each block: ``W = (q - z) s``, z = 2^(bits-1) where none is given. A changed block
gets either its old scale and zero point or new ones that span its values, whichever errs less in
the sum of squares: a block that the update does not touch stays as it is, code by code.

Source: onnxruntime, docs/ContribOperators.md, MatMulNBits.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from gauge_ext.errors import ConfigError, NonFiniteError
from gauge_ext.export.disk.numbers import BY_ONNX, Array, Number
from gauge_ext.export.disk.onnx_file import OnnxFile, StoredTensor
from gauge_ext.export.disk.spans import opened, read_into, write_all
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
    blocks, n = weight.blocks, weight.count
    update = update.astype(np.dtype("<f4"))
    error = moved = total = 0.0
    with ExitStack() as stack:
        spans = [part.span for part in weight.parts if part.span is not None]
        readers = [stack.enter_context(opened(span.path)) for span in spans]
        writers = [stack.enter_context(opened(target.path, os.O_RDWR)) for target in targets]
        # A quarter of the rows: decoding and two encodings take several arrays of that size.
        for start, stop in row_blocks(blocks.rows, 4 * n * blocks.size):
            codes, scales, zero = weight.decode(read_rows(weight, readers, start, stop))
            wanted = (codes - zero) * scales
            flat = wanted.reshape(stop - start, -1)[:, : blocks.columns]
            change = -flat
            flat += update.rows(start, stop)
            update.rescale(flat, start)
            change += flat
            if not np.isfinite(wanted).all():
                raise NonFiniteError(
                    f"{name} or its sum with the update holds NaN or infinity.",
                    hint="Nothing was written.",
                )
            codes, scales, zero, lost = _encode(weight, wanted, scales, zero)
            for writer, target, row, content in zip(
                writers,
                targets,
                weight.row_bytes,
                weight.encode(codes, scales, zero),
                strict=True,
            ):
                write_all(
                    writer,
                    target.offset + start * row,
                    np.ascontiguousarray(content).data.cast("B"),
                )
            error += lost
            moved += float(np.vdot(change, change))
            total += float(np.vdot(wanted, wanted))
    return Loss((error / moved) ** 0.5 if moved else 0.0, (error / total) ** 0.5 if total else 0.0)


def _encode(
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
