"""Everything or nothing on disk: work in a hidden folder beside the target, rename at the end.

Beside the target and not in /tmp, because a rename is atomic only within one file system. Each
file is synced before it is renamed: on some file systems a full disk shows only then, and a name
must never point at bytes that a power cut can still lose.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from gauge_ext import checkpoint
from gauge_ext.checkpoint.staging import hidden_folder, replace_file
from gauge_ext.errors import WriteError

_HINTS = {
    errno.ENOSPC: "Free some space or choose another disk.",
    errno.EDQUOT: "The quota is used up: free some space or choose another disk.",
    errno.EFBIG: "The file is larger than this file system or this process may write.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "This file system is read-only: choose another folder.",
    errno.ENOTDIR: "A part of this path is a file: choose another folder.",
    errno.EEXIST: "A part of this path is a file: choose another folder.",
}


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turns an OSError of the body into one WriteError that names the target.

    Raises:
        WriteError: the body raised OSError; the message keeps the system's words.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        code = error.errno if error.errno is not None else 0
        raise WriteError(
            f"cannot write {target}: {error.strerror or error}; nothing was left there.",
            hint=_HINTS.get(code, "Check that the folder exists and can be written."),
        ) from error


@contextlib.contextmanager
def staged_files(target: Path) -> Iterator[Path]:
    """A temporary folder whose files move beside ``target`` when the body ends without an error.

    The body writes ``folder / target.name`` and whatever belongs to it, weights under the name that
    :func:`data_name` gives. The other files move first and ``target.name`` last, so that the file
    that a reader opens appears when all that it refers to is there. If a move fails, what was there
    before comes back; a kill leaves the old file or the new one, whole, and perhaps a hidden folder
    that the next writer of the same file removes.

    Args:
        target: Where the main file shall be; missing parent folders are made, and removed again
            if nothing comes of it.

    Yields:
        The temporary folder.

    Raises:
        WriteError: the target cannot be written. Nothing is left, an existing file is untouched.
    """
    if target.is_dir():
        raise WriteError(
            f"cannot write {target}: it is a folder.",
            hint="Give the name of a file, for example " + str(target / "model.onnx") + ".",
        )
    with _folder_beside(target) as folder:
        yield folder
        with write_errors(target):
            _move_into_place(folder, target)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the body ends without an error.

    Args:
        target: The folder to make; it must not exist, or be empty.

    Yields:
        The temporary folder.

    Raises:
        WriteError: the target cannot be written, or holds something. Nothing is left.
    """
    with write_errors(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise WriteError(
                f"cannot write {target}: it exists and is not an empty folder.",
                hint="Choose a new folder, or remove this one first.",
            )
    with checkpoint.staged_folder(target) as folder:
        yield folder
        for file in folder.rglob("*"):
            sync(file)


def data_name(target: Path) -> str:
    """What a model's file of weights is to be called.

    ``model.onnx.data``, or if there is one, the first free of ``model.onnx.1.data`` and so on: two
    files cannot be replaced at once, so a new model never takes the weights of the old one.
    :func:`staged_files` removes the old ones when the new model is in place.

    Args:
        target: The model's file.
    """
    names = (f"{target.name}{'' if n == 0 else f'.{n}'}.data" for n in count())
    return next(name for name in names if not os.path.lexists(target.parent / name))


def require_space(target: Path, needed: int) -> None:
    """Refuses early what cannot fit, instead of after minutes of work.

    Args:
        target: The file or folder to write; its nearest existing parent is asked.
        needed: Bytes about to be written.

    Raises:
        WriteError: less than ``needed`` bytes are free.
    """
    folder = target.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with write_errors(target):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"cannot write {target}: it takes about {needed / 2**20:.1f} MiB and "
            f"{free / 2**20:.1f} MiB are free.",
            hint=_HINTS[errno.ENOSPC],
        )


@contextlib.contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    parent = target.absolute().parent
    made: list[Path] = []
    done = False
    try:
        with contextlib.ExitStack() as stack:
            with write_errors(target):
                _make_parents(parent, made)
                folder = stack.enter_context(hidden_folder(parent, target.name))
            yield folder
        done = True
    finally:
        if not done:
            for path in reversed(made):
                with contextlib.suppress(OSError):  # someone else put a file there meanwhile
                    path.rmdir()


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)


def _move_into_place(folder: Path, target: Path) -> None:
    files = sorted(file for file in folder.iterdir() if file.name != target.name)
    files.append(folder / target.name)
    mode = 0o666 & ~_umask()
    for file in files:
        file.chmod(mode)
        sync(file)
    replaced: list[tuple[Path, Path]] = []
    try:
        for file in files[:-1]:
            place, backup = target.parent / file.name, folder / f"replaced.{file.name}"
            replaced.append((place, backup))
            replace_file(file, place, backup)
        sync(target.parent)
        files[-1].replace(target)  # from here on the new model is the one
    except OSError:
        for place, backup in reversed(replaced):
            if backup.exists():
                backup.replace(place)
            elif not (folder / place.name).exists():
                place.unlink(missing_ok=True)
        raise
    sync(target.parent)
    ours = re.compile(rf"{re.escape(target.name)}(\.\d+)?\.data")
    kept = {file.name for file in files}
    for path in target.parent.iterdir():
        if ours.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the disk has taken a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
