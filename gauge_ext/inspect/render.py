"""The inspection as a table in the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gauge_ext.inspect.adapter import PRUNING_LOSSES, AdapterInspection, LayerInspection
from gauge_ext.inspect.precision import FORMATS
from gauge_ext.inspect.readers import READERS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: What a table can be sorted by, largest first, beside the file's own order.
SORT_KEYS: dict[str, Callable[[LayerInspection], float]] = {
    "norm": lambda layer: layer.spectrum.frobenius,
    "sigma": lambda layer: layer.spectrum.largest,
    "rank": lambda layer: layer.spectrum.effective_rank,
    "condition": lambda layer: layer.spectrum.condition,
}

# The columns of numbers leave this much of 80 to a layer's name.
_NUMBERS_WIDTH = 64
_NAME_WIDTH = 14


def render(
    inspection: AdapterInspection,
    console: Console,
    *,
    sort: str | None = None,
    top: int | None = None,
) -> None:
    """Print the table and the totals.

    Args:
        inspection: What :func:`gauge_ext.inspect.inspect_adapter` returned.
        console: Where to print.
        sort: A key of :data:`SORT_KEYS`, largest first; None keeps the file's order.
        top: Show the first so many rows; None shows all. The totals are always of all layers.
    """
    from rich.text import Text

    rows = list(inspection.layers)
    if sort is not None:
        rows.sort(key=SORT_KEYS[sort], reverse=True)

    table = _table(
        f"adapter {inspection.path}",
        "layer",
        ("out×in", "r", "scale", "‖ΔW‖F", "σmax", "rank", "eff.", "stable", "cond."),
    )
    for layer in rows[:top]:
        spectrum = layer.spectrum
        table.add_row(
            Text(_fold(layer.name, max(_NAME_WIDTH, console.width - _NUMBERS_WIDTH))),
            f"{layer.out_features}×{layer.in_features}",
            str(layer.rank),
            f"{layer.scaling:.4g}",
            f"{spectrum.frobenius:.4g}",
            f"{spectrum.largest:.4g}",
            str(spectrum.numerical_rank),
            f"{spectrum.effective_rank:.2f}",
            f"{spectrum.stable_rank:.2f}",
            f"{spectrum.condition:.3g}",
        )
    console.print(table)
    if len(rows[:top]) < len(rows):
        console.print(f"{len(rows) - len(rows[:top])} more layer(s) not shown")
    _beside(inspection, rows[:top], console)
    console.print(
        f"{len(rows)} layers, {inspection.parameters:,} parameters, {inspection.nbytes:,} bytes "
        f"({', '.join(inspection.dtypes)}), ‖ΔW‖F over all layers {inspection.frobenius:.4g}",
        highlight=False,
    )
    for told in inspection.notes:
        console.print(told, style="yellow", highlight=False, markup=False)
    console.print(
        f"base model: {inspection.base_model or 'not recorded'}\nsha256: {inspection.sha256}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        "ΔW = scaling · lora_B · lora_A; σ: its singular values, the same in every gauge "
        "(lora_B G⁻¹, G lora_A). rank: σ above rounding; eff.: exp of the entropy of σ/Σσ; "
        "stable: ‖ΔW‖F²/σmax²; cond.: σmax/σmin.",
        style="dim",
        highlight=False,
    )


def _beside(inspection: AdapterInspection, rows: list[LayerInspection], console: Console) -> None:
    """Print what goes beyond the layers' spectra."""
    if any(layer.base is not None for layer in rows):
        table = _table("against the base", "layer", ("‖W₀‖F", "share", "k", "overlap", "chance"))
        for layer in rows:
            if (base := layer.base) is not None:
                table.add_row(
                    layer.name,
                    f"{base.weight_norm:.4g}",
                    f"{base.share:.2%}",
                    str(base.subspace),
                    f"{base.overlap:.2%}",
                    f"{base.chance:.2%}",
                )
        console.print(table)
    for other in inspection.comparisons:
        table = _table(f"beside {other.name}", "layer", ("cosine", "distance", "outputs", "inputs"))
        for pair in other.layers:
            table.add_row(
                pair.name,
                _number(pair.cosine),
                _number(pair.distance),
                _span(pair.column_angles),
                _span(pair.row_angles),
            )
        console.print(table)
        copies = ": one update in two copies" if other.duplicate else ""
        console.print(
            f"all layers: cosine {_number(other.cosine)}, distance {_number(other.distance)}"
            f"{copies}; {len(other.only_here)} layers here alone, {len(other.only_there)} there",
            highlight=False,
        )
    gauges = list(rows[0].rounding[0].errors)
    table = _table("error of ΔW in fewer bits, all layers, by gauge", "format", gauges)
    for name in FORMATS:
        table.add_row(name, *(f"{error:.3%}" for error in inspection.rounding(name).values()))
    console.print(table)
    table = _table(
        "rank that is needed", "at most this share of ‖ΔW‖F lost", ("of", "sum of ranks")
    )
    stored = sum(layer.rank for layer in inspection.layers)
    for loss in PRUNING_LOSSES:
        needed = sum(layer.spectrum.rank_within(loss) for layer in inspection.layers)
        table.add_row(f"{loss:.0%}", str(stored), str(needed))
    console.print(table)
    for found in inspection.findings:
        console.print(
            f"{READERS[found.reader][0]}: {found.effect}: {found.reason}. {found.remedy}",
            style="yellow" if found.effect == "refused" else "bold red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _table(title: str, first: str, headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(first, overflow="fold", min_width=_NAME_WIDTH)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _span(angles: tuple[float, ...]) -> str:
    return f"{angles[0]:.1f}°–{angles[-1]:.1f}°" if angles else "–"


def _fold(name: str, width: int) -> str:
    """Break a module's path after dots, so that no line is longer than ``width`` if possible."""
    lines = textwrap.wrap(name.replace(".", ". "), width, break_long_words=False)
    return "\n".join(line.replace(". ", ".") for line in lines)
