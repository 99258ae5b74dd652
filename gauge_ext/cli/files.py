"""Checks of the files that a command will write, and small files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from gauge_ext.cli.problems import OptionError, blame


def check_target(path: Path, option: str) -> None:
    """Refuse a file that can't be written, before the work that it is for.

    Missing parent folders are fine: they are made when the file is.

    Raises:
        OptionError: The path is a folder, or the folder that it would go to cannot take it.
    """
    if path.is_dir():
        raise OptionError(option, f"{str(path)!r} is a folder.", hint="Give a file's name in it.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OptionError(
            option, f"{str(folder)!r} is a file, not a folder.", hint="Choose another folder."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(
            option, f"no permission to write in {str(folder)!r}.", hint="Choose another folder."
        )


def write_text(path: Path, text: str, option: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OptionError: It cannot be written; nothing is left behind.
    """
    from gauge_ext.export.disk.files import staged_files

    with blame(option), staged_files(path) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
