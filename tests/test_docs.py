"""The code on the pages runs, their links lead somewhere, and the seed gets what it is owed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MATH = ROOT / "docs" / "math.md"
TRAINING = ROOT / "docs" / "training.md"


def blocks(page: Path) -> list[tuple[int, str]]:
    """Each Python block of a page: the line it starts at, and its code."""
    text = page.read_text(encoding="utf-8")
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
@pytest.mark.parametrize(
    ("page", "least"),
    [(README, 2), (MATH, 12), (TRAINING, 7)],
    ids=["README", "math", "training"],
)
def test_every_block_of_a_page_runs_after_those_before_it(
    page: Path, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert len(found) >= least
    names: dict[str, object] = {}
    for line, code in found:
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", [README, MATH, TRAINING], ids=["README", "math", "training"])
def test_a_page_names_no_module_or_file_that_does_not_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|docs|gauge_ext)/[\w/.]+)`", text)
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    for path in (*(ROOT / name for name in named), *(page.parent / name for name in linked)):
        assert path.exists(), path


def test_the_page_does_not_lean_on_the_citation_that_could_not_be_verified() -> None:
    text = MATH.read_text(encoding="utf-8")
    assert "**Not verified.**" in text
    assert text.index("**Not verified.**") < text.index("2503.11223")
