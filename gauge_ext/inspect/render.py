"""The inspection as a table in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from gauge_ext.inspect.adapter import AdapterInspection, LayerInspection

if TYPE_CHECKING:
    from rich.console import Console

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
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(inspection.layers)
    if sort is not None:
        rows.sort(key=SORT_KEYS[sort], reverse=True)

    table = Table(
        title=Text(f"adapter {inspection.path}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold", min_width=_NAME_WIDTH)
    for heading in ("out×in", "r", "scale", "‖ΔW‖F", "σmax", "rank", "eff.", "stable", "cond."):
        table.add_column(heading, justify="right", no_wrap=True)
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
    console.print(
        f"{len(rows)} layers, {inspection.parameters:,} parameters, {inspection.nbytes:,} bytes "
        f"({', '.join(inspection.dtypes)}), ‖ΔW‖F over all layers {inspection.frobenius:.4g}",
        highlight=False,
    )
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


def _fold(name: str, width: int) -> str:
    """Break a module's path after dots, so that no line is longer than ``width`` if possible."""
    lines = textwrap.wrap(name.replace(".", ". "), width, break_long_words=False)
    return "\n".join(line.replace(". ", ".") for line in lines)
