"""The table of goals that a benchmark ends with: measured, goal, met or short by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """One row: what is wanted of a figure, and what it was.

    Attributes:
        name: What was measured, with its number in the list of goals.
        measured: The figure.
        limit: What it should be.
        at_least: Whether larger is better; else smaller is.
        unit: What stands behind the figures.
    """

    name: str
    measured: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    @property
    def verdict(self) -> str:
        """``met``, or how far the figure is from the goal."""
        if self.met:
            return "met"
        return f"short by {abs(self.measured - self.limit):.3g}{self.unit}"

    def as_dict(self) -> dict[str, object]:
        """For a file of figures."""
        return {**asdict(self), "met": self.met}


def render_goals(goals: Sequence[Goal], console: Console) -> None:
    """Print one line a goal."""
    table = Table(title="goals", title_justify="left")
    for column in ("", "measured", "goal", ""):
        table.add_column(column, justify="right" if column else "left")
    for goal in goals:
        bound = ">=" if goal.at_least else "<="
        table.add_row(
            goal.name,
            f"{goal.measured:.3g}{goal.unit}",
            f"{bound} {goal.limit:.3g}{goal.unit}",
            goal.verdict,
        )
    console.print(table)
