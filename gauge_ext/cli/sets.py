"""Sets of inputs by name, from files that the user gives: arrays, or prompts as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gauge_ext.cli.base import folder_of
from gauge_ext.cli.problems import OptionError, blame, first_line

Set = dict[str, Any]


def read_arrays(path: Path, option: str) -> Set:
    """Read a file of ``numpy.savez``.

    Raises:
        OptionError: It is none.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError(
            option,
            f"{str(path)!r} is no file of arrays: {first_line(error)}.",
            hint="Write one with numpy.savez(path, input_ids=...).",
        ) from error


def read_calibration(paths: Sequence[Path], base: str | None) -> list[Set]:
    """Read ``--calibration``: arrays, or in a .txt one prompt a line.

    Args:
        paths: The files.
        base: BASE, whose tokenizer reads prompts; None where prompts are of no use.

    Raises:
        OptionError: A file cannot be read or holds no prompt, or there is no tokenizer.
    """
    sets: list[Set] = []
    for path in paths:
        text = path.suffix == ".txt"
        sets.extend(_read_prompts(path, base) if text else [read_arrays(path, "--calibration")])
    return sets


def _read_prompts(path: Path, base: str | None) -> list[Set]:
    with blame("BASE"):
        folder = None if base is None else folder_of(base)
    if folder is None:
        raise OptionError(
            "--calibration",
            f"{str(path)!r} is text, which is for models that generate and whose folder has a "
            "tokenizer.",
            hint="Write arrays with numpy.savez(path, input_ids=...).",
        )
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            "--calibration", f"{str(path)!r} cannot be read: {first_line(error)}."
        ) from error
    if not lines:
        raise OptionError(
            "--calibration", f"{str(path)!r} has no prompt in it.", hint="Write one on each line."
        )
    import numpy as np

    from gauge_ext.export.language.prompt import tokenizer_of

    with blame("--calibration"):
        tokenizer = tokenizer_of(folder)
    return [{"input_ids": np.array([tokenizer(line)["input_ids"]])} for line in lines]
