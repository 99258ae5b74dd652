"""``gauge-ext inspect``: what an adapter does to each layer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import print_json, stdout, working
from gauge_ext.cli.problems import blame, explains_errors


class SortBy(StrEnum):
    """What the table can be sorted by; the keys of ``gauge_ext.inspect.SORT_KEYS``."""

    NORM = "norm"
    SIGMA = "sigma"
    RANK = "rank"
    CONDITION = "condition"


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
    as_json: options.Json = False,
) -> None:
    """Show rank, norm and spectrum of each layer of an adapter.

    The base model is not needed. Every number describes scaling * lora_B @ lora_A, so it is the
    same however the product is split into its two factors.
    """
    with working("inspecting") as progress, blame("DIR"):
        from gauge_ext.inspect import inspect_adapter, render

        inspection = inspect_adapter(adapter, progress=progress)
    if as_json:
        print_json(inspection.to_dict())
    else:
        render(inspection, stdout(), sort=sort, top=top)
