"""The command line, ``gauge-ext``.

One file a command; :mod:`base` loads BASE, :mod:`problems` turns errors into one paragraph,
:mod:`console` prints. A command imports torch and everything heavy when it runs, so that
``--help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gauge_ext.cli import (
    combine,
    demo,
    doctor,
    export,
    extract,
    inspect,
    merge,
    onnx_adapter,
    patch,
    provenance,
    quantize,
    regauge,
    validate,
)

app = typer.Typer(
    name="gauge-ext",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help folds well into 80 columns
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from gauge_ext._version import __version__

        typer.echo(f"gauge-ext {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Low-rank adapters from training to a validated ONNX file."""


for _command in (
    demo.demo,
    export.export,
    validate.validate,
    provenance.provenance,
    onnx_adapter.onnx_adapter,
    quantize.quantize,
    merge.merge,
    patch.patch,
    extract.extract,
    combine.combine,
    inspect.inspect,
    regauge.regauge,
    doctor.doctor,
):
    app.command()(_command)


def main() -> None:
    """Run the command line; the console script ``gauge-ext``."""
    app()
