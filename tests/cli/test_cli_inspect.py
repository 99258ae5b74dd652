"""``gauge-ext inspect``: a table or JSON; the numbers themselves are tested in tests/inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Delta = Callable[[tuple[Tensor, Tensor]], Tensor]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]


def test_the_table(make_adapter: MakeAdapter, run: Run) -> None:
    adapter, factors = make_adapter("bert")
    result = run("inspect", adapter)
    assert result.exit_code == 0, result.output
    for name in factors:
        assert name in result.stdout
    assert "6 layers" in result.stdout


def test_sorted_and_cut(make_adapter: MakeAdapter, delta: Delta, run: Run) -> None:
    adapter, factors = make_adapter("bert")
    norms = {name: float(torch.linalg.norm(delta(pair))) for name, pair in factors.items()}
    largest = max(norms, key=norms.__getitem__)
    result = run("inspect", adapter, "--sort", "norm", "--top", 1)
    assert [name for name in factors if name in result.stdout] == [largest]
    assert "5 more layer(s)" in result.stdout


def test_json(make_adapter: MakeAdapter, delta: Delta, run: Run) -> None:
    adapter, factors = make_adapter("bert")
    result = run("inspect", adapter, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["totals"]["layers"] == len(factors)
    for layer in report["layers"]:
        norm = torch.linalg.norm(delta(factors[layer["name"]]))
        torch.testing.assert_close(torch.tensor(layer["frobenius"]), norm)


def test_every_sort_key_is_offered() -> None:
    from gauge_ext.cli.inspect import SortBy
    from gauge_ext.inspect import SORT_KEYS

    assert [key.value for key in SortBy] == list(SORT_KEYS)


def test_an_unknown_sort_key_has_status_2(make_adapter: MakeAdapter, run: Run) -> None:
    adapter, _ = make_adapter("bert")
    result = run("inspect", adapter, "--sort", "colour")
    assert result.exit_code == 2
    assert "condition" in result.stderr
