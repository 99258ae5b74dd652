"""The protobuf of an ONNX file, read without the weights in it.

Protobuf's own parsers hold a whole message in memory, and none is larger than 2 GiB. Here a file is
walked field by field: weights are stepped over and their place is noted, so that what remains, the
*skeleton*, is small and goes to the onnx package as any other message.

Source: protobuf.dev/programming-guides/encoding, and the field numbers of onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.spans import opened, read_into

# Messages that can hold tensors -> their fields that do, by number.
_FIELDS = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        10: "Tensor",
        6: "Graph",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_METADATA_PROPS = 14  # of Model
# Tensor's fields that hold its numbers.
RAW_DATA, FLOAT_DATA, DOUBLE_DATA = 9, 4, 10
_PAYLOADS = {RAW_DATA, FLOAT_DATA, DOUBLE_DATA, 5, 7, 11}  # int32, int64, uint64
_NOTES = {6, 9}  # Node's doc_string and metadata_props: torch keeps whole stack traces there
_SMALL = 64  # numbers that stay in the skeleton: shapes, axes, scalars
_LONG_NOTE = 256
_KEPT_NOTE = b"pkg.torch.onnx.name_scopes"
_OPAQUE = 1024  # a node this short holds nothing worth stepping over
_SKELETON_LIMIT = 2**28
_DEPTH_LIMIT = 64
_WINDOW = 2**18


@dataclass(frozen=True)
class Message:
    """A field of variable length within a file.

    Attributes:
        number: The field's number.
        length_at: Where its length is written, right after its tag.
        start: Its first byte.
        end: The byte after its last.
    """

    number: int
    length_at: int
    start: int
    end: int


@dataclass(frozen=True)
class ScannedTensor:
    """A TensorProto within a file.

    Attributes:
        chain: The messages around it, from the outermost to itself.
        head: Its fields but for the numbers, unless these are few.
        payloads: Where its numbers are.
    """

    chain: tuple[Message, ...]
    head: bytes
    payloads: tuple[Message, ...]

    @property
    def is_initializer(self) -> bool:
        """Whether it is one of the main graph's."""
        return [message.number for message in self.chain] == [7, 5]


@dataclass
class Scan:
    """A file without its weights.

    Attributes:
        path: The file.
        size: Its size.
        skeleton: The ModelProto, in which tensors have no numbers unless they are few, and nodes
            no long notes.
        tensors: All tensors, in order.
        metadata: The entries of the model's ``metadata_props``, in order.
    """

    path: Path
    size: int
    skeleton: bytes
    tensors: list[ScannedTensor] = field(default_factory=list)
    metadata: list[Message] = field(default_factory=list)


def scan(path: Path) -> Scan:
    """Walks an ONNX file.

    Raises:
        ConfigError: it cannot be read, is cut short, is no protobuf, or is very large even without
            the weights.
    """
    try:
        with opened(path) as handle:
            size = os.fstat(handle).st_size
            walk = _Walk(path, handle, size)
            skeleton = walk.strip("Model", 0, size, ())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    return Scan(path, size, skeleton, walk.tensors, walk.metadata)


class _Walk:
    """Reads a file through a small window."""

    def __init__(self, path: Path, handle: int, size: int) -> None:
        self.tensors: list[ScannedTensor] = []
        self.metadata: list[Message] = []
        self._path, self._handle, self._size = path, handle, size
        self._window, self._at = b"", 0
        self._kept = 0

    def strip(self, kind: str, start: int, end: int, chain: tuple[Message, ...]) -> bytes:
        """A message without long notes and the numbers of tensors; the tensors are listed."""
        if len(chain) > _DEPTH_LIMIT:
            raise self._damaged("its messages are nested too deep")
        kept: list[bytes] = []
        inner = _FIELDS[kind]
        run = start  # what lies from here to the current field is kept as it is
        for message, tag_at in self._messages(start, end):
            within = inner.get(message.number)
            if kind == "Model" and message.number == _METADATA_PROPS:
                self.metadata.append(message)
            if kind == "Node" and self._is_long_note(message):
                kept.append(self._read(run, tag_at))
                run = message.end
                continue
            if within is None or (within == "Node" and message.end - message.start <= _OPAQUE):
                continue
            kept.append(self._read(run, tag_at))
            if within == "Tensor":
                body = self._tensor(message, (*chain, message))
            else:
                body = self.strip(within, message.start, message.end, (*chain, message))
            kept += [self._read(tag_at, message.length_at), varint(len(body)), body]
            run = message.end
        kept.append(self._read(run, end))
        return b"".join(kept)

    def _is_long_note(self, message: Message) -> bool:
        if message.number not in _NOTES or message.end - message.start <= _LONG_NOTE:
            return False
        return _KEPT_NOTE not in self._read(message.start, message.start + len(_KEPT_NOTE) + 2)

    def _tensor(self, message: Message, chain: tuple[Message, ...]) -> bytes:
        kept, payloads, run = [], [], message.start
        for field_, tag_at in self._messages(message.start, message.end):
            if field_.number not in _PAYLOADS:
                continue
            payloads.append(field_)
            if field_.end - field_.start > _SMALL:
                kept.append(self._read(run, tag_at))
                run = field_.end
        kept.append(self._read(run, message.end))
        head = b"".join(kept)
        self.tensors.append(ScannedTensor(chain, head, tuple(payloads)))
        return head

    def _messages(self, start: int, end: int) -> Iterator[tuple[Message, int]]:
        """The fields of variable length, and where their tags are; all others are stepped over."""
        at = start
        while at < end:
            tag_at = at
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if number == 0:
                raise self._damaged("a field has the number 0")
            if kind == 0:
                _, at = self._varint(at, end)
            elif kind == 1:
                at += 8
            elif kind == 5:
                at += 4
            elif kind == 2:
                length_at = at
                length, at = self._varint(at, end)
                if length > end - at:
                    raise self._damaged(
                        f"a field at byte {tag_at:,} should have {length:,} bytes and "
                        f"{end - at:,} are left"
                    )
                yield Message(number, length_at, at, at + length), tag_at
                at += length
            else:
                raise self._damaged(f"a field at byte {tag_at:,} is of the unknown kind {kind}")
        if at != end:
            raise self._damaged("its last field is cut short")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise self._damaged(f"a number at byte {at:,} does not end")
            if not self._at <= at < self._at + len(self._window):
                self._window = self._pread(at, min(_WINDOW, self._size - at))
                self._at = at
            byte = self._window[at - self._at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
            shift += 7

    def _read(self, start: int, end: int) -> bytes:
        self._kept += end - start
        if self._kept > _SKELETON_LIMIT:
            raise ConfigError(
                f"{self._path} has more than {_SKELETON_LIMIT // 2**20} MiB that are no weights.",
                hint="Is it an ONNX model?",
            )
        if self._at <= start and end <= self._at + len(self._window):
            return self._window[start - self._at : end - self._at]
        return self._pread(start, end - start)

    def _pread(self, start: int, length: int) -> bytes:
        content = bytearray(length)
        read_into(self._handle, start, memoryview(content))
        return bytes(content)

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._path} is not a whole ONNX file: {why}.", hint="Copy or download it again."
        )


def varint(value: int) -> bytes:
    """An unsigned number as protobuf writes it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
