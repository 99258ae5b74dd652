"""``gauge-ext inspect``: a table or JSON; the numbers themselves are tested in tests/inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import Result

import gauge_ext

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


def test_beside_another_and_as_a_page(make_adapter: MakeAdapter, run: Run, tmp_path: Path) -> None:
    adapter, factors = make_adapter("bert")
    page = tmp_path / "report.html"
    result = run("inspect", adapter, "--compare", adapter, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (other,) = report["comparisons"]
    assert other["duplicate"]
    assert other["distance"] < 1e-6
    text = page.read_text(encoding="utf-8")
    assert "One update in two copies" in text
    for name in factors:
        assert name in text
    # Nothing that a browser would fetch or run.
    assert not any(mark in text for mark in ("<script", "http://", "https://", "src="))


def test_the_page_in_a_browser(
    make_adapter: MakeAdapter, run: Run, tmp_path: Path, look: Callable[..., Any]
) -> None:
    adapter, factors = make_adapter("bert")
    page = tmp_path / "report.html"
    result = run("inspect", adapter, "--compare", adapter, "--html", page)
    assert result.exit_code == 0, result.output
    seen = look(page.read_text(encoding="utf-8"), "svg, .fill", "tr")
    assert seen.scroll_width <= seen.client_width == 390  # nothing sticks out sideways
    assert seen.errors == []
    plots, rows = seen.counts
    assert plots > 0
    assert rows >= len(factors)
    assert (tmp_path / "look.png").stat().st_size > 10_000


def test_beside_its_base(
    make_adapter: MakeAdapter, bert_folder: Path, delta: Delta, run: Run
) -> None:
    adapter, factors = make_adapter("bert")
    result = run("inspect", adapter, "--base", bert_folder, "--json")
    assert result.exit_code == 0, result.output
    weights = load_file(bert_folder / "model.safetensors")
    for layer in json.loads(result.stdout)["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        share = torch.linalg.norm(delta(factors[layer["name"]])) / torch.linalg.norm(weight)
        torch.testing.assert_close(torch.tensor(layer["base"]["share"]), share)


def test_a_reader_that_would_misread_it_fails_the_command(
    make_adapter: MakeAdapter, run: Run
) -> None:
    adapter, _ = make_adapter("bert")
    assert run("inspect", adapter, "--target", "sglang").exit_code == 0
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_rslora": True}))
    result = run("inspect", adapter, "--target", "sglang")
    assert result.exit_code == 1
    assert "use_rslora is not read" in result.stdout


def test_every_reader_is_offered() -> None:
    from gauge_ext.cli.inspect import Reader
    from gauge_ext.inspect import READERS

    assert [reader.value for reader in Reader] == list(READERS)


def test_a_missing_base_names_the_option(
    make_adapter: MakeAdapter, fails: Callable[..., str], tmp_path: Path
) -> None:
    adapter, _ = make_adapter("bert")
    fails("--base", "inspect", adapter, "--base", tmp_path / "nowhere")
    fails("--compare", "inspect", adapter, "--compare", tmp_path / "nowhere")
    fails("--html", "inspect", adapter, "--html", tmp_path)


def test_a_grouped_convolution_is_told_by_its_name(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=4, target_modules=["0"]))
    gauge_ext.save_adapter(model, tmp_path / "adapter")
    told = fails("DIR", "inspect", tmp_path / "adapter")
    assert "0: the adapter on a convolution of 2 groups" in told
