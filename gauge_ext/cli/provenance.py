"""``gauge-ext provenance``: where an exported file came from, and whether that is true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.adapted import Architecture
from gauge_ext.cli.base import load_base
from gauge_ext.cli.console import print_json, stdout, working
from gauge_ext.cli.problems import OptionError, blame, explains_errors

if TYPE_CHECKING:
    from gauge_ext.export.provenance import Provenance

_LONG = 100  # longer values are for programs: the table of parameters, the layers


@explains_errors
def provenance(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="An exported ONNX file, an adapter's file for one (.onnx_adapter, .safetensors), "
            "or the folder of a model that generates.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Check that it was made from this: a local transformers folder, or "
            "module:factory.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Check that this adapter is in it.", show_default=False),
    ] = None,
    architecture: Architecture = None,
    as_json: options.Json = False,
) -> None:
    """Show where an exported file came from, and check it against given files.

    For a folder, every file, and what each graph says of its precision, base and adapter, is
    compared with the manifest, gauge_ext.json. Exits with status 1 when something is not what the
    file says.

    A gauge is told of adapters' files (.safetensors), whose factors are in one. A merged graph has
    none: the merged weights are the same in every gauge.
    """
    with working("reading"):
        from gauge_ext.export.provenance import check_provenance, read_provenance

        with blame("FILE"):
            found = read_provenance(file)
        digest = None
        if adapter is not None:
            with blame("--adapter"):
                from gauge_ext.checkpoint import read_adapter

                digest = read_adapter(adapter).sha256
        model = None
        if base is not None:
            with blame("--base"):
                model = load_base(base, architecture=architecture).model
        found = check_provenance(found, model=model, adapter_sha256=digest)
    if as_json:
        print_json(found.to_dict())
    else:
        _render(found)
    if not found.passed:
        wrong = [check for check in found.checks if not check.passed]
        option = "FILE"
        if wrong[0].what.startswith("base_sha256"):
            option = "--base"
        elif wrong[0].what.startswith(("adapter_sha256", "adapter_number")):
            option = "--adapter"
        raise OptionError(
            option,
            f"{', '.join(check.what for check in wrong)}: not what {str(file)!r} says.",
            hint="It was made from something else, or changed since.",
        )


def _render(found: Provenance) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    for name, said in found.graphs.items():
        table = Table(show_header=False, title=Text(name), title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in sorted(said.items()):
            short = value if len(value) <= _LONG else f"{value[:_LONG]} ... (--json shows all)"
            table.add_row(Text(key.replace("_", " ")), Text(short))
        console.print(table)
    for check in found.checks:
        style = "green" if check.passed else "bold red"
        words = Text(f"{check.what}: ")
        words.append("as it says" if check.passed else "differs", style=style)
        if not check.passed:
            words.append(
                f" (it says {check.claimed or 'nothing'}, found {check.found or 'nothing'})"
            )
        console.print(words, soft_wrap=True)
