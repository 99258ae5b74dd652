"""A folder that is written file by file, and goes on where it was interrupted.

Every file has its name only when it is complete and on the disk; the folder has its name only when
all files are there. So whatever a kill leaves is either the whole result, or a hidden folder beside
its place, from which the same job goes on and any other starts anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gauge_ext.errors import WriteError
from gauge_ext.export.disk.files import sync, write_errors

_JOB, _LOCK, _DRAFT = "job", "lock", ".part"


@dataclass(frozen=True)
class Stage:
    """A folder in the making.

    Attributes:
        folder: Where its files are written; it has no others.
    """

    folder: Path

    def has(self, name: Path) -> bool:
        """Whether a file was finished, now or before an interruption."""
        return (self.folder / name).exists()

    @contextlib.contextmanager
    def file(self, name: Path) -> Iterator[Path]:
        """An empty file to write, which gets its name when the body ends without an error."""
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(place.name + _DRAFT)
        draft.write_bytes(b"")
        yield draft
        sync(draft)
        draft.replace(place)
        sync(place.parent)


@contextlib.contextmanager
def resumable_folder(target: Path, job: str) -> Iterator[Stage]:
    """A folder that becomes ``target`` when the body ends without an error.

    Args:
        target: The folder to make; it must not exist, or be empty.
        job: What is written. What an interrupted job left is used again by the same job only.

    Yields:
        The folder in the making.

    Raises:
        WriteError: the target cannot be written, holds something, or is being written by another
            process. After an error nothing is left; after an interruption, what was finished.
    """
    with write_errors(target):
        if target.exists() and (not target.is_dir() or any(_content(target))):
            raise WriteError(
                f"cannot write {target}: it exists and is not an empty folder.",
                hint="Choose a new folder, or remove this one first.",
            )
        place = Path(os.path.realpath(target))
        # A mount of its own cannot be replaced by renaming: there the files move in at the end.
        mounted = os.path.ismount(place)
        hidden = (place if mounted else place.parent) / f".{place.name}.partial"
        made = [path for path in (hidden.parent, *hidden.parent.parents) if not path.exists()]
        hidden.mkdir(parents=True, exist_ok=True)
        lock = _lock(hidden, target)
    try:
        with write_errors(target):
            stage = _prepare(hidden, job)
        yield stage
        with write_errors(target):
            _publish(stage.folder, place, mounted=mounted)
    except (KeyboardInterrupt, SystemExit):
        raise  # the same call goes on from here
    except BaseException as error:
        _remove(hidden, made)
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            with write_errors(target):
                raise
        raise
    else:
        _remove(hidden, [])
    finally:
        os.close(lock)


def _content(target: Path) -> Iterator[Path]:
    return (path for path in target.iterdir() if path.name != f".{target.name}.partial")


def _lock(hidden: Path, target: Path) -> int:
    handle = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            raise WriteError(
                f"cannot write {target}: another process is writing it.",
                hint="Wait for it, or choose another folder.",
            ) from error
        raise
    return handle


def _prepare(hidden: Path, job: str) -> Stage:
    folder, note = hidden / "new", hidden / _JOB
    if not note.exists() or note.read_text() != job:
        shutil.rmtree(folder, ignore_errors=True)
        note.write_text(job)
    folder.mkdir(exist_ok=True)
    for draft in folder.rglob(f"*{_DRAFT}"):
        draft.unlink()
    return Stage(folder)


def _publish(folder: Path, place: Path, *, mounted: bool) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    if mounted:
        for entry in sorted(folder.iterdir()):
            entry.rename(place / entry.name)
    else:
        folder.rename(place)  # also over an empty folder, at once
    sync(place.parent)


def _remove(hidden: Path, made: list[Path]) -> None:
    shutil.rmtree(hidden, ignore_errors=True)
    for path in made:
        with contextlib.suppress(OSError):  # someone else put a file there meanwhile
            path.rmdir()
