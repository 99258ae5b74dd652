"""An ONNX file with some of its messages exchanged; all other bytes are copied as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from gauge_ext.export.disk.spans import Span
from gauge_ext.export.disk.wire import Message, Scan, varint


@dataclass(frozen=True)
class Hole:
    """As many bytes as there were, to be written by somebody else.

    Attributes:
        span: The bytes of the old file.
    """

    span: Span

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.span.length


Piece = bytes | Span | Hole
Edit = tuple[tuple[Message, ...], bytes | Hole]  # the messages around and including it; the new


def splice(scanned: Scan, edits: Sequence[Edit], appended: bytes = b"") -> list[Piece]:
    """The file with some messages exchanged, as pieces in order.

    Args:
        scanned: The file.
        edits: Which messages, by the chain that leads to them, and what they become. No two may
            contain each other.
        appended: Serialized fields of the ModelProto to add; repeated ones come after the old.

    Returns:
        New bytes, spans of the old file, and the holes among the edits.
    """
    ordered = sorted(edits, key=lambda edit: [message.start for message in edit[0]])
    pieces, _ = _splice(scanned.path, 0, scanned.size, ordered)
    return [*pieces, appended] if appended else pieces


def _splice(path: Path, start: int, end: int, edits: list[Edit]) -> tuple[list[Piece], int]:
    pieces: list[Piece] = []
    run = start
    for message, group in groupby(edits, key=lambda edit: edit[0][0]):
        within = list(group)
        inner: list[Piece]
        if len(within[0][0]) == 1:
            new = within[0][1]
            inner, length = [new], new.length if isinstance(new, Hole) else len(new)
        else:
            deeper = [(chain[1:], new) for chain, new in within]
            inner, length = _splice(path, message.start, message.end, deeper)
        pieces += [Span(path, run, message.length_at - run), varint(length), *inner]
        run = message.end
    pieces.append(Span(path, run, end - run))
    return pieces, sum(len(p) if isinstance(p, bytes) else p.length for p in pieces)
