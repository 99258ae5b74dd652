"""An ONNX file opened for reading: its graph, and where each weight lies, with nothing loaded.

Everything that a file says about places and sizes is checked here, once, before anyone acts on it:
a model from a stranger may name files outside its folder, or tensors larger than the file.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gauge_ext.errors import ConfigError
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.spans import Span
from gauge_ext.export.disk.wire import DOUBLE_DATA, FLOAT_DATA, RAW_DATA, Scan, ScannedTensor, scan

if TYPE_CHECKING:
    import onnx

# Bits of an element, by TensorProto.DataType.
_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    14: 64,
    15: 128,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 4,
    24: 8,
    25: 2,
    26: 2,
}
FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16
_STRING = 8
# Numbers of a fixed width in a typed field lie there as in raw_data.
_PLAIN_FIELDS = {RAW_DATA: None, FLOAT_DATA: FLOAT, DOUBLE_DATA: DOUBLE}
_EXTERNAL = 1  # TensorProto.DataLocation


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an ONNX file.

    Attributes:
        name: Its name.
        dims: Its shape.
        data_type: TensorProto.DataType.
        span: Where its numbers lie as they are in memory; None where there are none, or they are
            written in another way (``int32_data``).
        external: Whether they lie in a file of their own.
        scanned: Its place in the protobuf.
        proto: Itself, without its numbers.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    span: Span | None
    external: bool
    scanned: ScannedTensor
    proto: onnx.TensorProto

    @property
    def nbytes(self) -> int:
        """The size of its numbers."""
        return _nbytes(self.dims, self.data_type)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Attributes:
        path: The file.
        model: The ModelProto, whose tensors have no numbers unless they are few.
        initializers: Name -> tensor, those of the main graph.
        tensors: All tensors, those in nodes and in inner graphs too, in order.
        scanned: The bytes behind it.
        metadata: The ModelProto's ``metadata_props``.
    """

    path: Path
    model: onnx.ModelProto
    initializers: dict[str, StoredTensor]
    tensors: tuple[StoredTensor, ...]
    scanned: Scan
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """The size of the file and of the weights outside it."""
        outside = {t.span for t in self.tensors if t.external and t.span is not None}
        return self.scanned.size + sum(span.length for span in outside)


def open_onnx(path: str | Path) -> OnnxFile:
    """Opens an ONNX file without reading its weights.

    Raises:
        ConfigError: it is missing, damaged or no ONNX model; a tensor has an impossible shape or
            not the size that its shape asks for; or its data lie outside the model's folder, beyond
            the end of their file, or overlap another tensor's.
        ExportError: the onnx package is not installed.
    """
    require_packages("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}.", hint="Give the .onnx file itself.")
    scanned = scan(path)
    try:
        model = onnx.ModelProto.FromString(scanned.skeleton)
        protos = [onnx.TensorProto.FromString(tensor.head) for tensor in scanned.tensors]
    except DecodeError as error:
        raise ConfigError(
            f"{path} is not an ONNX model: {error}.", hint="Copy or download it again."
        ) from error
    if not model.HasField("graph") or not model.graph.node:
        raise ConfigError(f"{path} holds no graph.", hint="Is it an ONNX model?")
    folders = _folders(path)
    tensors = tuple(
        _stored(path, folders, entry, proto)
        for entry, proto in zip(scanned.tensors, protos, strict=True)
    )
    initializers: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.scanned.is_initializer and initializers.setdefault(tensor.name, tensor) != tensor:
            raise ConfigError(f"{path} has two initializers named {tensor.name!r}.")
    _refuse_overlap(path, tensors)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return OnnxFile(path, model, initializers, tensors, scanned, metadata)


def _stored(
    path: Path, folders: tuple[Path, ...], entry: ScannedTensor, proto: onnx.TensorProto
) -> StoredTensor:
    dims = tuple(proto.dims)
    name = proto.name or "a constant"
    if min(dims, default=0) < 0 or math.prod(dims) >= 2**60:
        raise ConfigError(f"{path}: {name!r} has the impossible shape {list(dims)}.")
    if proto.data_type not in _BITS and proto.data_type != _STRING:
        raise ConfigError(f"{path}: {name!r} is of the unknown type {proto.data_type}.")
    span, external = None, proto.data_location == _EXTERNAL
    if external:
        span = _external_span(path, folders, name, proto)
    elif len(entry.payloads) == 1 and entry.payloads[0].number in _PLAIN_FIELDS:
        payload = entry.payloads[0]
        if _PLAIN_FIELDS[payload.number] in {None, proto.data_type}:
            span = Span(path, payload.start, payload.end - payload.start)
    if span is not None and span.length != _nbytes(dims, proto.data_type):
        raise ConfigError(
            f"{path}: {name!r} of shape {list(dims)} takes {_nbytes(dims, proto.data_type):,} "
            f"bytes, and {span.length:,} are there.",
            hint="Copy or download it again.",
        )
    return StoredTensor(proto.name, dims, proto.data_type, span, external, entry, proto)


def _nbytes(dims: tuple[int, ...], data_type: int) -> int:
    return (math.prod(dims) * _BITS.get(data_type, 0) + 7) // 8


def _folders(path: Path) -> tuple[Path, ...]:
    """Where data may lie: the model's folder, and that of the file that a link stands for.

    A cache of downloads links both the model and its data into one folder.
    """
    return (Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent)


def _external_span(
    path: Path, folders: tuple[Path, ...], name: str, proto: onnx.TensorProto
) -> Span:
    said = {entry.key: entry.value for entry in proto.external_data}
    location = said.get("location", "")
    wrong = f"{path}: the data of {name!r} should be in {location!r}, "
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts or "\0" in location:
        raise ConfigError(
            wrong + "which is no path within the model's folder.",
            hint="A model must not read other files; get it from somebody you trust.",
        )
    file = path.parent / relative
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(folder) for folder in folders):
        raise ConfigError(
            wrong + f"a link to {real}, outside the model's folder.",
            hint="Replace the link by the file, if it is the right one.",
        )
    if not real.is_file():
        raise ConfigError(
            wrong + "and there is no such file.", hint="Copy it to where the model is."
        )
    nbytes = _nbytes(tuple(proto.dims), proto.data_type)
    try:
        offset = int(said.get("offset", "0"))
        length = int(said.get("length", nbytes))
    except ValueError as error:
        raise ConfigError(wrong + f"at a place that is no number: {error}.") from error
    size = real.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise ConfigError(
            wrong + f"bytes {offset:,} to {offset + length:,}, and the file has {size:,}.",
            hint="Copy or download it again; it may have been cut short.",
        )
    return Span(file, offset, length)


def _refuse_overlap(path: Path, tensors: tuple[StoredTensor, ...]) -> None:
    """The same bytes for two tensors are one weight used twice; anything between is damage."""
    outside = [t for t in tensors if t.external and t.span is not None and t.span.length]
    outside.sort(key=lambda tensor: tensor.span or Span(path, 0, 0))
    for one, other in itertools.pairwise(outside):
        a, b = one.span, other.span
        if a is not None and b is not None and a.path == b.path and a != b and b.offset < a.end:
            raise ConfigError(
                f"{path}: the data of {one.name!r} and {other.name!r} overlap.",
                hint="Copy or download it again.",
            )
