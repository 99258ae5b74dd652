"""``gauge-ext inspect``: what an adapter does to each layer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import note, print_json, stdout, working
from gauge_ext.cli.files import check_target, write_text
from gauge_ext.cli.problems import blame, explains_errors


class SortBy(StrEnum):
    """What the table can be sorted by; the keys of ``gauge_ext.inspect.SORT_KEYS``."""

    NORM = "norm"
    SIGMA = "sigma"
    RANK = "rank"
    CONDITION = "condition"


class Reader(StrEnum):
    """Whose reading can be judged; the keys of ``gauge_ext.inspect.READERS``."""

    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    OLIVE = "olive"


@explains_errors
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The adapter's folder, in the PEFT format.", show_default=False
        ),
    ],
    sort: Annotated[
        SortBy | None,
        typer.Option(
            help="Sort the table, largest first: by Frobenius norm, largest singular value, "
            "effective rank or condition number. Default: the file's order.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show only the first N layers.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of the model that it was trained on, to compare its weights with.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Another adapter for the same base, to compare with. May be given again.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[Reader] | None,
        typer.Option(
            help="Whose reading of the file to judge: a server or runtime. May be given again. "
            "Default: all that are known.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write it as one self-contained page.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what an adapter does to each layer: rank, norm, spectrum, and more.

    The base model is not needed. The numbers describe scaling * lora_B @ lora_A, so they are the
    same however the product is split into its two factors, but for what rounding those would cost.
    Leaves with status 1 if a reader named by --target would refuse or misread the file.
    """
    if html is not None:
        check_target(html, "--html")
    with working("inspecting") as progress:
        from gauge_ext.checkpoint import read_adapter
        from gauge_ext.checkpoint.weights import FolderWeights
        from gauge_ext.inspect import html_report, inspect_adapter, render

        with blame("--base"):
            weights = None if base is None else FolderWeights(base)
        with blame("--compare"):
            others = [read_adapter(other) for other in compare or ()]
        with blame("DIR"):
            inspection = inspect_adapter(
                adapter,
                base=weights,
                others=others,
                readers=None if target is None else [reader.value for reader in target],
                progress=progress,
            )
    if html is not None:
        write_text(html, html_report(inspection), "--html")
        note(f"wrote {html}")
    if as_json:
        print_json(inspection.to_dict())
    else:
        render(inspection, stdout(), sort=sort, top=top)
    if target is not None and inspection.findings:
        raise typer.Exit(1)
