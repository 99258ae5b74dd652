"""Writing a folder whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
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
    stage: Path | None = None
    try:
        nearest = next(p for p in (final, *final.parents) if p.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        # Inside a target that exists, since that may be a mount of its own; else beside it.
        place = final if final.is_dir() else final.parent
        made = [p for p in (place, *place.parents) if not p.exists()]
        place.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=place))
        # mkdtemp's folder is the owner's alone; the one to be published has the usual rights.
        fresh = stage / "new"
        fresh.mkdir()
        yield fresh
        _publish(fresh, final, stage / "old")
    except BaseException as error:
        _remove(stage)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise WriteError(
                f"{target} could not be written: {error.strerror or error}.",
                hint=_HINTS.get(error.errno or 0),
            ) from error
        raise
    _remove(stage)


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


def _remove(stage: Path | None) -> None:
    if stage is not None:
        shutil.rmtree(stage, ignore_errors=True)
