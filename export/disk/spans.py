"""Pieces of files: where bytes lie, how they are copied, and how they are read and written in turn.

Nothing here keeps more than a chunk in memory, and a copy goes through the kernel where it can
(``copy_file_range``, which also shares blocks on file systems that can).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHUNK = 2**20  # what is in work at once: fits the caches
_KERNEL_CHUNK = 2**30
# The kernel cannot copy between these two files itself; reading and writing always works.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}


@dataclass(frozen=True, order=True)
class Span:
    """Some bytes of a file.

    Attributes:
        path: The file.
        offset: The first byte.
        length: How many.
    """

    path: Path
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length

    def part(self, start: int, length: int) -> Span:
        """Some of these bytes, counted from the first of them."""
        if start < 0 or length < 0 or start + length > self.length:
            raise ValueError(f"{start}..{start + length} is not within {self.length} bytes")
        return Span(self.path, self.offset + start, length)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file's descriptor, closed at the end."""
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def read_into(handle: int, offset: int, buffer: memoryview) -> None:
    """Fills ``buffer`` from a place in a file.

    Raises:
        OSError: the file ends before; somebody cut it short meanwhile.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        done += count


def write_all(handle: int, offset: int, content: bytes | memoryview) -> None:
    """Writes all of ``content`` to a place in a file."""
    view = memoryview(content)
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def read(span: Span) -> bytes:
    """The bytes of a small span."""
    content = bytearray(span.length)
    with opened(span.path) as handle:
        read_into(handle, span.offset, memoryview(content))
    return bytes(content)


def copy_span(source: int, start: int, length: int, target: int, offset: int) -> None:
    """Copies bytes from one open file to a place in another.

    Args:
        source: The file to read.
        start: The first byte.
        length: How many.
        target: The file to write.
        offset: Where to.
    """
    while length:
        try:
            count = os.copy_file_range(source, target, min(length, _KERNEL_CHUNK), start, offset)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            _copy_through_memory(source, start, length, target, offset)
            return
        if count == 0:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        start, offset, length = start + count, offset + count, length - count


def _copy_through_memory(source: int, start: int, length: int, target: int, offset: int) -> None:
    buffer = memoryview(bytearray(min(length, CHUNK)))
    while length:
        piece = buffer[: min(length, CHUNK)]
        read_into(source, start, piece)
        write_all(target, offset, piece)
        start, offset, length = start + len(piece), offset + len(piece), length - len(piece)
