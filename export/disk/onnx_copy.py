"""A copy of an ONNX file in which the numbers of some tensors are left to be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gauge_ext.export.disk.onnx_file import OnnxFile, StoredTensor
from gauge_ext.export.disk.spans import Span, copy_span, opened, write_all
from gauge_ext.export.disk.splice import Edit, Hole, splice
from gauge_ext.export.patching.update import Place

_PAGE = 4096  # weights that start on a page can be mapped instead of read


class Copy:
    """The graph with its weights, but for those that change.

    Weights inside the file stay inside, at their place; those outside go to one file, in the order
    of the old ones. Two tensors that share their bytes still do, unless one of them changes.

    Args:
        file: The old file.
        model: The new file.
        data: The new file of weights, written only if there are weights outside.
        changed: Tensors whose numbers will be written by somebody else.
        metadata: Entries of ``metadata_props`` to set.
    """

    def __init__(
        self,
        file: OnnxFile,
        model: Path,
        data: Path,
        changed: Sequence[StoredTensor],
        metadata: Mapping[str, str],
    ) -> None:
        self._file, self._model, self._data = file, model, data
        self._changed = {id(tensor) for tensor in changed}
        self._places: dict[int, Place] = {}
        self._copies: list[tuple[Span, int]] = []  # of weights outside: from where, to where
        edits = [*self._lay_out(), *self._holes(changed), *self._metadata(metadata)]
        new = [_entry(key, value) for key, value in metadata.items() if key not in file.metadata]
        self._pieces = splice(file.scanned, edits, b"".join(new))
        self._place_holes(changed)

    def place(self, tensor: StoredTensor) -> Place:
        """Where the numbers of a changed tensor belong."""
        return self._places[id(tensor)]

    def write(self) -> None:
        """Writes everything but the changed numbers.

        Raises:
            OSError: a file cannot be read or written.
        """
        if any(tensor.external for tensor in self._file.tensors):
            self._write_data()
        with (
            opened(self._file.path) as reader,
            opened(self._model, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as writer,
        ):
            at = 0
            for piece in self._pieces:
                length = len(piece) if isinstance(piece, bytes) else piece.length
                if isinstance(piece, bytes):
                    write_all(writer, at, piece)
                elif isinstance(piece, Span):
                    copy_span(reader, piece.offset, length, writer, at)
                at += length
            os.truncate(writer, at)

    def _write_data(self) -> None:
        with opened(self._data, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as writer:
            os.truncate(writer, self._end)
            for path in dict.fromkeys(span.path for span, _ in self._copies):
                with opened(path) as reader:
                    for span, offset in self._copies:
                        if span.path == path:
                            copy_span(reader, span.offset, span.length, writer, offset)

    def _lay_out(self) -> list[Edit]:
        """Gives every weight outside its new place, and writes that into its tensor."""
        outside = [t for t in self._file.tensors if t.external and t.span is not None]
        outside.sort(key=lambda tensor: tensor.span or Span(self._model, 0, 0))
        shared: dict[Span, int] = {}
        edits: list[Edit] = []
        self._end = 0
        for tensor in outside:
            span = tensor.span
            assert span is not None
            mine = id(tensor) in self._changed
            offset = None if mine else shared.get(span)
            if offset is None:
                step = _PAGE if span.length >= _PAGE else 64
                offset = -(-self._end // step) * step
                self._end = offset + span.length
                if mine:
                    self._places[id(tensor)] = Place(self._data, offset)
                else:
                    shared[span] = offset
                    self._copies.append((span, offset))
            proto = type(tensor.proto)()
            proto.CopyFrom(tensor.proto)
            del proto.external_data[:]
            entries = {"location": self._data.name, "offset": offset, "length": span.length}
            for key, value in entries.items():
                proto.external_data.add(key=key, value=str(value))
            edits.append((tensor.scanned.chain, proto.SerializeToString()))
        return edits

    def _holes(self, changed: Sequence[StoredTensor]) -> list[Edit]:
        """Leaves the numbers of changed tensors inside the file to be written."""
        edits: list[Edit] = []
        for tensor in changed:
            if not tensor.external and tensor.span is not None:
                payload = tensor.scanned.payloads[0]
                edits.append(((*tensor.scanned.chain, payload), Hole(tensor.span)))
        return edits

    def _place_holes(self, changed: Sequence[StoredTensor]) -> None:
        at, offsets = 0, {}
        for piece in self._pieces:
            if isinstance(piece, Hole):
                offsets[piece.span] = at
            at += len(piece) if isinstance(piece, bytes) else piece.length
        for tensor in changed:
            if not tensor.external and tensor.span is not None:
                self._places[id(tensor)] = Place(self._model, offsets[tensor.span])

    def _metadata(self, metadata: Mapping[str, str]) -> list[Edit]:
        """Replaces entries that are there already."""
        edits: list[Edit] = []
        entries = self._file.model.metadata_props
        for entry, message in zip(entries, self._file.scanned.metadata, strict=True):
            if entry.key in metadata:
                body = _pair(entry.key, metadata[entry.key])
                edits.append(((message,), body))
        return edits


def _pair(key: str, value: str) -> bytes:
    from onnx import StringStringEntryProto

    return bytes(StringStringEntryProto(key=key, value=value).SerializeToString())


def _entry(key: str, value: str) -> bytes:
    """A field ``metadata_props`` as it stands in the file."""
    from onnx import ModelProto

    model = ModelProto()
    model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())
