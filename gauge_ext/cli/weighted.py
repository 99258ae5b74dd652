"""Adapters with weights, as several commands take them: ``DIR`` or ``DIR=0.5``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gauge_ext.cli.problems import blame

Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="DIR[=WEIGHT]",
        help="The adapter's folder, in the PEFT format. Give it several times to add several, each "
        "with the weight after the last '=' (default 1).",
        show_default=False,
    ),
]


def parse_adapters(arguments: list[str]) -> list[tuple[str | Path, float]]:
    """Split each ``DIR=WEIGHT`` at the last equals sign; a folder of that very name comes first."""
    found: list[tuple[str | Path, float]] = []
    for argument in arguments:
        folder, equals, weight = argument.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            equals = ""
        if equals and not Path(argument).exists():
            found.append((Path(folder), number))
        else:
            found.append((Path(argument), 1.0))
    return found


def check_adapters(chosen: list[tuple[str | Path, float]]) -> None:
    """Read every adapter once, before work begins: what is wrong with one is no fault of the base.

    Raises:
        OptionError: One is missing or damaged, holds NaN, or asks for more than can be merged.
    """
    with blame("--adapter"):
        from gauge_ext.export.patching.adapter_arrays import open_adapter

        for folder, weight in chosen:
            found = open_adapter(folder, weight)
            for module in found.modules:
                found.read(module)
