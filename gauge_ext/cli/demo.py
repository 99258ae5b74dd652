"""``gauge-ext demo``: the whole way on a real model and real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import stdout
from gauge_ext.cli.problems import OptionError, explains_errors
from gauge_ext.errors import WriteError


@explains_errors
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for everything that is made.")
    ] = Path("gauge-ext-demo"),
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the data.")] = 2,
    seed: options.Seed = 0,
) -> None:
    """Adapt a real model to search the Python standard library.

    Offline. Trains an adapter, saves it, merges it, exports it to a validated ONNX file, measures
    it against torch, and answers three queries with the ONNX file alone. Takes about three minutes
    on two cores; needs the extra gauge-ext[demo].
    """
    from gauge_ext.demo import run_demo

    try:
        run_demo(out=out, epochs=epochs, seed=seed, console=stdout())
    except WriteError as error:
        raise OptionError("--out", error.message, hint=error.hint) from error
