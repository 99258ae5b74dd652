"""``gauge-ext combine``: several adapters into one, without their base model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import print_json, stdout, working
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.errors import ConfigError, GeometryError

if TYPE_CHECKING:
    from gauge_ext.merging import CombinedAdapter


class MethodName(StrEnum):
    """The methods of ``gauge_ext.merging.METHODS``."""

    EXACT = "exact"
    KARCHER = "karcher"
    BURES = "bures"
    PROCRUSTES = "procrustes"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"
    KNOTS = "knots"


class SpaceName(StrEnum):
    """The spaces of ``gauge_ext.merging.SPACES``."""

    ENTRIES = "entries"
    KNOTS = "knots"


@explains_errors
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR=WEIGHT",
            help="Folders of adapters for one base model, in the PEFT format, each with its weight "
            "after the last '=': english=0.5 legal=0.5. A weight may be negative. Put -- before a "
            "folder whose name begins with a dash.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder to write; an adapter that lies there is replaced.",
            show_default=False,
        ),
    ],
    method: Annotated[
        MethodName,
        typer.Option(
            help="exact: the weighted sum. karcher, bures, procrustes: means of factors, for "
            "versions of one adapter. ties, dare_linear, dare_ties, magnitude_prune, knots: sparse "
            "merges, which need --density."
        ),
    ] = MethodName.EXACT,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Largest rank of each module. Default: what holds the result without loss.",
            show_default=False,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Share of each module's squared norm to keep, such as 0.99, by the smallest rank "
            "that does.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Share of entries that the sparse merges keep, such as 0.2.",
            show_default=False,
        ),
    ] = None,
    space: Annotated[
        SpaceName | None,
        typer.Option(
            help="Which entries: those of the update, or coordinates in a common basis (KnOTS), "
            "which never form it. Default: entries, but knots for knots.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the entries that dare_* drop.")
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """Combine adapters of one base model into one.

    Ranks, alphas and rsLoRA may differ, and it does not matter how an adapter splits its updates
    into factors: updates are added, not factors. The distance from the exact weighted sum is
    reported for each module.
    """
    with working("combining") as progress:
        from gauge_ext.checkpoint import read_adapter
        from gauge_ext.merging import Recipe
        from gauge_ext.merging.adapters import combine_adapters

        parsed = [_parse(argument) for argument in adapters]
        for folder, _ in parsed:
            if out.exists() and out.resolve() == folder.resolve():
                raise OptionError(
                    "--out",
                    f"{str(out)!r} is one of the adapters to combine.",
                    hint="Choose another folder.",
                )
        if energy is not None:
            with blame("--energy"):
                Recipe(energy=energy)
        with blame("--method"):
            recipe = Recipe(
                method=method.value,
                rank=rank,
                energy=energy,
                density=density,
                seed=seed,
                space=None if space is None else space.value,
            )
        with blame("DIR=WEIGHT"):
            weights = recipe.check_weights([weight for _, weight in parsed], len(parsed))
            checkpoints = [read_adapter(folder) for folder, _ in parsed]
        with blame("DIR=WEIGHT", {ConfigError: "--space", GeometryError: "--method"}):
            combined = combine_adapters(checkpoints, weights, recipe, progress=progress)
        with blame("--out"):
            combined.save(out)
    if as_json:
        print_json({"path": str(out), **combined.to_dict()})
    else:
        _render(combined, out)


def _parse(argument: str) -> tuple[Path, float]:
    """Split ``DIR=WEIGHT`` at the last equals sign."""
    folder, equals, weight = argument.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = None
    if not equals or not folder or number is None:
        raise OptionError(
            "DIR=WEIGHT",
            f"{argument!r} has no weight.",
            hint=f"Write {folder or weight}=0.5, or =1 to take all of it.",
        )
    return Path(folder), number


def _render(combined: CombinedAdapter, out: Path) -> None:
    """Print a row for each module, and the totals."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    table = Table(
        title=Text(f"{combined.recipe.method} of {len(combined.weights)} adapters", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    for heading in ("out×in", "ranks", "rank", "‖ΣwΔW‖F", "cut", "from the sum"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in combined.layers:
        table.add_row(
            Text(layer.name),
            f"{layer.shape[0]}×{layer.shape[1]}",
            "+".join(map(str, layer.ranks)),
            str(layer.rank),
            f"{layer.norm:.4g}",
            f"{layer.truncation:.2%}",
            f"{layer.deviation:.2%}",
        )
    console.print(table)
    from gauge_ext.merging.adapters import parameters

    console.print(
        f"{out}: {len(combined.layers)} layers, {parameters(combined.checkpoint):,} parameters, "
        f"{combined.deviation:.2%} from the weighted sum over all layers\n"
        f"sha256: {combined.checkpoint.sha256}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        "cut: what the rank leaves out of the method's result; from the sum: the distance of what "
        "was written from ΣwΔW. Both are norms over norms.",
        style="dim",
        highlight=False,
    )
