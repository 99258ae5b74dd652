"""The code in docs/math.md runs, and says of the seed what the seed is owed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "math.md"


def blocks() -> list[tuple[int, str]]:
    """Each Python block of the page: the line it starts at, and its code."""
    text = PAGE.read_text(encoding="utf-8")
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_every_block_of_the_page_runs_after_those_before_it() -> None:
    found = blocks()
    assert len(found) >= 12
    names: dict[str, object] = {}
    for line, code in found:
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)


def test_the_page_names_no_module_or_file_that_does_not_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    root = PAGE.parents[1]
    for path in re.findall(r"`((?:tests|docs|gauge_ext)/[\w/.]+)`", text):
        assert (root / path).exists(), path


def test_the_page_does_not_lean_on_the_citation_that_could_not_be_verified() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "**Not verified.**" in text
    assert text.index("**Not verified.**") < text.index("2503.11223")
