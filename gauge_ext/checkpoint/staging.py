"""Writing a folder whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gauge_ext.errors import WriteError

_HINTS = {
    errno.ENOSPC: "The disk is full; free some space.",
    errno.EDQUOT: "Your disk quota is used up; free some space.",
    errno.EFBIG: "The file is larger than allowed here (ulimit -f).",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "The file system is read-only; choose another folder.",
    errno.ENOTDIR: "Choose another folder.",
}


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to write to, whose content becomes that of ``target`` at the end.

    If the body or the end fails, ``target`` is as it was and nothing is left beside it. In a target
    that exists, files of the same name are replaced and the others stay. Everything happens on
    target's own file system, so that the end is a matter of renaming.

    Args:
        target: The folder to be made or filled; its parents are made too.

    Yields:
        The folder to write to.

    Raises:
        WriteError: The system refused a write; the message says why.
    """
    final = Path(os.path.realpath(target))
    made: list[Path] = []
    try:
        nearest = next(p for p in (final, *final.parents) if p.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        # Inside a target that exists, since that may be a mount of its own; else beside it.
        place = final if final.is_dir() else final.parent
        made = [p for p in (place, *place.parents) if not p.exists()]
        place.mkdir(parents=True, exist_ok=True)
        with hidden_folder(place, final.name) as stage:
            # mkdtemp's folder is the owner's alone; the one to be published has the usual rights.
            fresh = stage / "new"
            fresh.mkdir()
            yield fresh
            _publish(fresh, final, stage / "old")
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise WriteError(
                f"{target} could not be written: {error.strerror or error}.",
                hint=_HINTS.get(error.errno or 0),
            ) from error
        raise


@contextlib.contextmanager
def hidden_folder(place: Path, name: str) -> Iterator[Path]:
    """Give an empty hidden folder in ``place``, which is removed at the end.

    Those that a killed process left for the same name are removed first. A folder is in use as long
    as somebody holds the lock on it, which the system drops with the process.

    Args:
        place: A folder that exists.
        name: What it is for.

    Yields:
        The folder.
    """
    prefix, suffix = f".{name}.", ".partial"
    with _lock(place, wait=True) as alone:
        for entry in place.iterdir() if alone else ():
            if entry.name.startswith(prefix) and entry.name.endswith(suffix):
                _remove_if_abandoned(entry)
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=place))
        held = contextlib.ExitStack()
        held.enter_context(_lock(folder))
    with held:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_file(new: Path, place: Path, backup: Path) -> bool:
    """Put a file in place of another, at once, and keep the other under the name ``backup``.

    Returns:
        Whether there was another.
    """
    there = place.exists()
    if there:
        try:
            backup.hardlink_to(place)
        except OSError:  # a file system without links
            shutil.copy2(place, backup)
    new.replace(place)
    return there


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock on a folder; say whether it was to be had."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
    except OSError:  # somebody else's, or a file system without locks
        locked = False
    try:
        yield locked
    finally:
        os.close(handle)


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), _lock(folder) as alone:
        if alone:
            shutil.rmtree(folder, ignore_errors=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write ``content`` and wait until the disk has taken it, so that a full one is noticed."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(fresh: Path, final: Path, old: Path) -> None:
    if not final.exists():
        fresh.rename(final)
        return
    old.mkdir()
    moved: list[Path] = []
    try:
        for entry in sorted(fresh.iterdir()):
            place = final / entry.name
            moved.append(place)
            if entry.is_file() and (place.is_file() or not place.exists()):
                replace_file(entry, place, old / entry.name)
                continue
            if place.exists():
                place.rename(old / entry.name)
            entry.rename(place)
    except BaseException:
        for place in reversed(moved):
            if (old / place.name).exists():
                (old / place.name).replace(place)
            elif place.exists() and not (fresh / place.name).exists():
                place.unlink()
        raise
