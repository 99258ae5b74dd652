"""The page that docs/make_compatibility.py writes has a line for every row, and no bad one."""

from __future__ import annotations

import re
from pathlib import Path

from peft_rows import ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of the page."""
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("| ") and not line.startswith("| feature")
        ]
        for part in text.split("\n## ")
    ]


def test_the_page_is_that_of_the_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table, _ = tables(text)
    assert [cells[0] for cells in table] == [row.name for row in ROWS]
    for row, (_, ours, theirs, *answers) in zip(ROWS, table, strict=True):
        rounding = f"< {row.tolerance:.0e}"
        assert ours == rounding
        assert answers == ["yes", "yes", "yes"]
        # A difference of PEFT's is explained, and what is explained is one.
        assert (theirs != rounding) == bool(row.peft_is)
        note = f"- {row.name}: {row.peft_is}." if row.peft_is else f"- {row.name}:"
        assert (note in text) == bool(row.peft_is)
    assert re.search(r"PEFT \d+\.\d+", text)


def test_two_adapters_are_exact_or_refused() -> None:
    _, table = tables(PAGE.read_text(encoding="utf-8"))
    assert [cells[0] for cells in table] == [row.name for row in ROWS]
    for row, (_, *ours, _) in zip(ROWS, table, strict=True):
        # One adapter on the model may train biases; of a module to save one works at a time, or
        # one for each sample.
        first = "bias" in row.fields
        sole = first or "modules_to_save" in row.fields
        one = first or "target_parameters" in row.fields or row.name == "MultiheadAttention"
        exact = f"< {row.tolerance:.0e}"
        assert ours == ["refused" if no else exact for no in (first, sole, one)]
