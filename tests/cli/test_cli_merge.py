"""``gauge-ext merge``: weights equal to W + s B A by hand, everything else carried along."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
SmallFiles = Callable[[int], AbstractContextManager[None]]
Delta = Callable[[tuple[Tensor, Tensor]], Tensor]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]


def test_a_transformers_folder(
    bert_folder: Path, make_adapter: MakeAdapter, delta: Delta, run: Run, tmp_path: Path
) -> None:
    (bert_folder / "vocab.txt").write_text("a\nb\n")
    adapter, factors = make_adapter("bert")
    out = tmp_path / "merged"
    result = run("merge", bert_folder, "--adapter", adapter, "--out", out)
    assert result.exit_code == 0, result.output
    assert "6 weights merged" in result.stdout
    assert (out / "vocab.txt").read_text() == "a\nb\n"
    before = load_file(bert_folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in factors:
            torch.testing.assert_close(tensor, before[name] + delta(factors[module]))
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.usefixtures("factory_folder")
def test_a_factory(make_adapter: MakeAdapter, delta: Delta, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(7)
    first, second = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)
    adapter, factors = make_adapter("tiny")
    out = tmp_path / "merged"
    result = run("merge", "tiny_models:model", "--adapter", adapter, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["merged"] == ["first.weight", "second.weight"]
    assert report["carried"] == 2
    assert report["files"] == [str(out / "model.safetensors")]
    after = load_file(out / "model.safetensors")
    torch.testing.assert_close(after["first.weight"], first.weight + delta(factors["first"]))
    torch.testing.assert_close(after["second.weight"], second.weight + delta(factors["second"]))
    assert torch.equal(after["first.bias"], first.bias)
    assert torch.equal(after["second.bias"], second.bias)


@pytest.mark.usefixtures("unchanged_after_setup")
class TestNothingIsWrittenWhen:
    """One bad input each; no file may be left or changed."""

    def test_the_target_holds_something(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("merge", "tiny_models:model", "--adapter", tiny)
        assert "not an empty folder" in fails("--out", *arguments, "--out", tmp_path)

    def test_the_disk_is_full(
        self, tiny: Path, fails: Fails, small_files: SmallFiles, tmp_path: Path
    ) -> None:
        arguments = ("merge", "tiny_models:model", "--adapter", tiny)
        with small_files(700):
            said = fails("--out", *arguments, "--out", tmp_path / "merged")
        assert "nothing was left" in said

    def test_the_factory_raises(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        out = tmp_path / "merged"
        fails("BASE", "merge", "tiny_models:raises", "--adapter", tiny, "--out", out)

    def test_the_base_holds_nan(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        out = tmp_path / "merged"
        said = fails("BASE", "merge", "tiny_models:nan", "--adapter", tiny, "--out", out)
        assert "first" in said

    def test_there_is_no_adapter(self, fails: Fails, bert_source: Path, tmp_path: Path) -> None:
        for base in ("tiny_models:model", bert_source):
            fails("--adapter", "merge", base, "--out", tmp_path / "merged")

    def test_the_base_is_missing(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        fails("BASE", "merge", "no/folder", "--adapter", tiny, "--out", tmp_path / "merged")


def test_a_folder_that_holds_something(
    bert_folder: Path, make_adapter: MakeAdapter, fails: Fails
) -> None:
    adapter, _ = make_adapter("bert")
    before = sorted(bert_folder.rglob("*"))
    fails("--out", "merge", bert_folder, "--adapter", adapter, "--out", bert_folder)
    assert sorted(bert_folder.rglob("*")) == before


def test_nan_in_the_weights_of_a_folder(
    bert_folder: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    tensors = load_file(bert_folder / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, bert_folder / "model.safetensors", metadata={"format": "pt"})
    adapter, _ = make_adapter("bert")
    out = tmp_path / "merged"
    assert name in fails("BASE", "merge", bert_folder, "--adapter", adapter, "--out", out)
    assert not out.exists()


def test_a_full_disk(
    bert_folder: Path, make_adapter: MakeAdapter, fails: Fails, small_files: SmallFiles
) -> None:
    adapter, _ = make_adapter("bert")
    out = bert_folder.parent / "merged"
    with small_files(700):
        said = fails("--out", "merge", bert_folder, "--adapter", adapter, "--out", out)
    assert str(out) in said
    assert sorted(path.name for path in out.parent.iterdir()) == ["base", "bert-adapter"]
