"""``gauge-ext combine``: sums by hand, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
SmallFiles = Callable[[int], AbstractContextManager[None]]
Delta = Callable[[tuple[Tensor, Tensor]], Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]
MakeAdapter = Callable[..., tuple[Path, Factors]]


@pytest.fixture
def two(make_adapter: MakeAdapter) -> tuple[tuple[Path, Factors], tuple[Path, Factors]]:
    """Two adapters for BERT with different factors, of which the second scales twice as much."""
    first, factors = make_adapter("bert")
    moved = first.with_name("first")
    shutil.move(first, moved)

    def spoil(found: Factors) -> None:
        for index, (name, (a, b)) in enumerate(found.items()):
            found[name] = (a.flip(0, 1) + index, b.flip(0))

    second, others = make_adapter("bert", spoil=spoil, config={"lora_alpha": 12.0})
    return (moved, factors), (second, others)


def updates(folder: Path) -> dict[str, Tensor]:
    """B·A of each module of what was written, whose scaling is 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    paths = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    return {
        path.removeprefix("base_model.model."): tensors[path + ends[1]] @ tensors[path + ends[0]]
        for path in paths
    }


def test_a_weighted_sum(two: tuple, delta: Delta, run: Run, tmp_path: Path) -> None:
    (first, factors), (second, others) = two
    out = tmp_path / "sum"
    result = run("combine", f"{first}=0.5", f"{second}=-0.25", "--out", out)
    assert result.exit_code == 0, result.output
    found = updates(out)
    assert set(found) == set(factors)
    for name, update in found.items():
        expected = 0.5 * delta(factors[name]) - 0.25 * 2 * delta(others[name])
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
        assert name in result.stdout
    assert "6 layers" in result.stdout
    assert "0.00% from the weighted sum" in result.stdout


def test_json(two: tuple, run: Run, tmp_path: Path) -> None:
    (first, _), (second, _) = two
    out = tmp_path / "sum"
    result = run("combine", f"{first}=1", f"{second}=1", "--out", out, "--rank", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == str(out)
    assert report["weights"] == [1.0, 1.0]
    assert {layer["rank"] for layer in report["layers"]} == {2}
    assert 0.0 < report["totals"]["deviation"] < 1.0


@pytest.mark.parametrize(
    "options",
    [
        ("--energy", "0.9"),
        ("--method", "ties", "--density", "0.3", "--rank", "3"),
        ("--method", "ties", "--density", "0.3", "--space", "knots"),
        ("--method", "knots", "--density", "0.3"),
        ("--method", "dare_linear", "--density", "0.5", "--seed", "4"),
    ],
)
def test_the_other_methods(options: tuple[str, ...], two: tuple, run: Run, tmp_path: Path) -> None:
    (first, _), (second, _) = two
    out = tmp_path / "merged"
    result = run("combine", f"{first}=1", f"{second}=1", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert len(updates(out)) == 6


def test_a_mean_of_one_adapter_with_itself(
    make_adapter: MakeAdapter, delta: Delta, run: Run, tmp_path: Path
) -> None:
    folder, factors = make_adapter("tiny")
    for method in ("karcher", "bures", "procrustes"):
        out = tmp_path / method
        pairs = (f"{folder}=0.3", f"{folder}=0.7")
        result = run("combine", *pairs, "--out", out, "--method", method)
        assert result.exit_code == 0, result.output
        for name, update in updates(out).items():
            torch.testing.assert_close(update, delta(factors[name]), rtol=1e-4, atol=1e-5)


def test_every_method_and_space_is_offered() -> None:
    from gauge_ext.cli.combine import MethodName, SpaceName
    from gauge_ext.merging import METHODS, SPACES

    assert tuple(MethodName) == METHODS
    assert tuple(SpaceName) == SPACES


def test_a_folder_with_an_equals_sign(make_adapter: MakeAdapter, run: Run, tmp_path: Path) -> None:
    folder, _ = make_adapter("tiny")
    odd = folder.with_name("alpha=0.5")
    shutil.move(folder, odd)
    result = run("combine", f"{odd}=2", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("unchanged_after_setup")
class TestNothingIsWrittenWhen:
    """One mistake each; no file may be left or changed."""

    def test_a_weight_is_missing(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        out = ("--out", tmp_path / "out")
        assert "has no weight" in fails("DIR=WEIGHT", "combine", tiny, *out)
        assert "has no weight" in fails("DIR=WEIGHT", "combine", f"{tiny}=0,5", *out)
        assert "has no weight" in fails("DIR=WEIGHT", "combine", "=0.5", *out)
        assert "finite" in fails("DIR=WEIGHT", "combine", f"{tiny}=inf", *out)

    def test_an_adapter_is_missing(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("combine", f"{tiny}=1", "no/folder=1", "--out", tmp_path / "out")
        assert "no/folder does not exist" in fails("DIR=WEIGHT", *arguments)

    def test_the_target_is_an_input(self, tiny: Path, fails: Fails) -> None:
        said = fails("--out", "combine", f"{tiny}=1", "--out", tiny / ".." / tiny.name)
        assert "one of the adapters" in said

    def test_the_target_is_a_file(self, tiny: Path, fails: Fails) -> None:
        file = tiny / "adapter_config.json"
        fails("--out", "combine", f"{tiny}=1", "--out", file)

    def test_an_option_does_not_fit(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("combine", f"{tiny}=1", "--out", tmp_path / "out")
        assert "needs density" in fails("--method", *arguments, "--method", "ties")
        assert "means nothing" in fails("--method", *arguments, "--density", "0.5")
        assert "(0, 1]" in fails("--energy", *arguments, "--energy", "0")

    def test_a_weight_has_the_wrong_sign(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("combine", f"{tiny}=-1", "--out", tmp_path / "out", "--method", "bures")
        assert "positive weights" in fails("DIR=WEIGHT", *arguments)

    def test_the_disk_is_full(
        self, tiny: Path, fails: Fails, small_files: SmallFiles, tmp_path: Path
    ) -> None:
        with small_files(700):
            fails("--out", "combine", f"{tiny}=1", "--out", tmp_path / "out")


def test_unrelated_adapters_have_no_mean(two: tuple, fails: Fails, tmp_path: Path) -> None:
    (first, _), (second, _) = two
    pairs = (f"{first}=0.5", f"{second}=0.5")
    out = tmp_path / "out"
    said = fails("--method", "combine", *pairs, "--out", out, "--method", "bures")
    assert "encoder.layer" in said
    assert "aligned to" in said
    assert not out.exists()


def test_adapters_of_different_models(
    make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    first, _ = make_adapter("tiny")
    moved = first.with_name("first")
    shutil.move(first, moved)
    second, _ = make_adapter("tiny", shapes={"first": (7, 10)})
    pairs = (f"{moved}=1", f"{second}=1")
    assert "'first'" in fails("DIR=WEIGHT", "combine", *pairs, "--out", tmp_path / "out")
