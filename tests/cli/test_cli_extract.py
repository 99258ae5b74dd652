"""``gauge-ext extract``: from two models to an adapter, judged against dense SVDs taken here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

from gauge_ext.checkpoint import read_adapter

Run = Callable[..., Result]
Fails = Callable[..., str]


@pytest.fixture
def tuned_folder(bert_folder: Path, tmp_path: Path) -> Path:
    """The BERT folder after fine-tuning: every tensor moved but the second layer's queries."""
    folder = Path(shutil.copytree(bert_folder, tmp_path / "tuned"))
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if "layer.1.attention.self.query" not in name:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lost(before: Path, after: Path, key: str, rank: int) -> float:
    """The share of a layer's squared change that no update of this rank can explain."""
    old, new = (load_file(folder / "model.safetensors")[key].double() for folder in (before, after))
    s = torch.linalg.svdvals(new - old).square()
    return float(s[rank:].sum() / s.sum())


def test_a_transformers_folder(
    bert_folder: Path, tuned_folder: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    result = run("extract", bert_folder, tuned_folder, "--rank", 4, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    adapter = read_adapter(out)
    # The classes of the config's architecture say what is a linear layer: 6 a layer, and a pooler.
    assert len(adapter.tensors) == 2 * 6 + 1 - 1
    assert report["sha256"] == adapter.sha256
    assert report["unchanged"] == ["encoder.layer.1.attention.self.query"]
    assert "embeddings.word_embeddings.weight" in report["left_out"]
    assert "pooler.dense.bias" in report["left_out"]
    for layer in report["layers"]:
        least = lost(bert_folder, tuned_folder, f"{layer['name']}.weight", 4)
        assert layer["rank"] == 4
        assert least <= layer["unexplained"] + 1e-9 <= 1.02 * least + 1e-9
    # The other commands take it from here.
    assert run("inspect", out).exit_code == 0
    merged = run("merge", bert_folder, "--adapter", out, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output


def test_the_energy_and_the_table(
    bert_folder: Path, tuned_folder: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    result = run("extract", bert_folder, tuned_folder, "--energy", 0.9, "--out", out)
    assert result.exit_code == 0, result.output
    adapter = read_adapter(out)
    ranks = {name: pair.lora_A.shape[0] for name, pair in adapter.tensors.items()}
    for name, rank in ranks.items():
        assert lost(bert_folder, tuned_folder, f"{name}.weight", rank) <= 0.1
        assert lost(bert_folder, tuned_folder, f"{name}.weight", rank - 1) > 0.1 - 1e-3
        assert name in result.stdout
    assert f"{len(ranks)} layers" in result.stdout
    assert adapter.sha256 in result.stdout
    assert "left out: embeddings.word_embeddings.weight: changed by" in result.stderr
    assert "more tensors; --json lists them" in result.stderr
    assert "unchanged, and not adapted: 1 linear layer" in result.stderr


def test_targets_and_dtype(bert_folder: Path, tuned_folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    options = ("--target", "query", "--target", "pooler.dense", "--dtype", "bfloat16")
    result = run("extract", bert_folder, tuned_folder, *options, "--out", out)
    assert result.exit_code == 0, result.output
    tensors = read_adapter(out).tensors
    assert set(tensors) == {"encoder.layer.0.attention.self.query", "pooler.dense"}
    assert {pair.lora_A.dtype for pair in tensors.values()} == {torch.bfloat16}
    # Rank 16 by default, which is all of 16 x 16.
    assert {pair.lora_A.shape for pair in tensors.values()} == {(16, 16)}


def test_moments_weigh_the_outputs(
    bert_folder: Path, tuned_folder: Path, run: Run, tmp_path: Path
) -> None:
    name = "pooler.dense"
    inputs = torch.randn(100, 16, dtype=torch.float64) * torch.logspace(0, -2, 16)
    save_file({name: inputs.T @ inputs / 100}, tmp_path / "moments.safetensors")
    arguments = ("extract", bert_folder, tuned_folder, "--rank", 3, "--target", name)
    weigh = ("--moments", tmp_path / "moments.safetensors")
    plain = run(*arguments, "--out", tmp_path / "plain")
    weighted = run(*arguments, *weigh, "--out", tmp_path / "weighted")
    assert weighted.exit_code == 0, weighted.output
    assert "lost of output" in weighted.stdout
    assert "lost of output" not in plain.stdout
    old, new = (
        load_file(folder / "model.safetensors")[f"{name}.weight"].double()
        for folder in (bert_folder, tuned_folder)
    )
    errors = []
    for folder in ("plain", "weighted"):
        pair = read_adapter(tmp_path / folder).tensors[name]
        left = new - old - pair.lora_B.double() @ pair.lora_A.double()
        errors.append(float((left @ inputs.T).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.usefixtures("factory_folder")
def test_factories(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    Path("other_models.py").write_text(
        "import torch, tiny_models\n"
        "def model():\n"
        "    built = tiny_models.model()\n"
        "    with torch.no_grad():\n"
        "        built.first.weight.add_(torch.outer(torch.ones(10), torch.arange(6.0)))\n"
        "    return built\n"
    )
    result = run("extract", "tiny_models:model", "other_models:model", "--out", out, "--rank", 1)
    assert result.exit_code == 0, result.output
    pair = read_adapter(out).tensors["first"]
    torch.testing.assert_close(
        pair.lora_B @ pair.lora_A, torch.outer(torch.ones(10), torch.arange(6.0))
    )


def test_a_folder_whose_classes_are_unknown(
    bert_folder: Path, tuned_folder: Path, run: Run, tmp_path: Path
) -> None:
    (bert_folder / "config.json").write_text('{"model_type": "nothing_of_transformers"}')
    result = run("extract", bert_folder, tuned_folder, "--rank", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "guessed by their names" in result.stderr
    assert len(read_adapter(tmp_path / "out").tensors) == 12


class TestItFailsWithTheOptionAtFault:
    """Nothing is written."""

    @pytest.fixture(autouse=True)
    def _nothing(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not (tmp_path / "out").exists()

    def test_folders_that_are_not_there(
        self, bert_folder: Path, fails: Fails, tmp_path: Path
    ) -> None:
        out = ("--out", tmp_path / "out")
        assert "no such folder" in fails("BASE", "extract", "nowhere", bert_folder, *out)
        assert "no such folder" in fails("FINETUNED", "extract", bert_folder, "nowhere", *out)

    def test_the_same_model_twice(self, bert_folder: Path, fails: Fails, tmp_path: Path) -> None:
        said = fails("FINETUNED", "extract", bert_folder, bert_folder, "--out", tmp_path / "out")
        assert "do not differ" in said

    def test_options_out_of_range(
        self, bert_folder: Path, tuned_folder: Path, fails: Fails, tmp_path: Path
    ) -> None:
        arguments = ("extract", bert_folder, tuned_folder, "--out", tmp_path / "out")
        assert "must lie in (0, 1]" in fails("--energy", *arguments, "--energy", 1.5)
        assert "may be 'query'" in fails("--target", *arguments, "--target", "qwery")

    def test_moments_that_do_not_fit(
        self, bert_folder: Path, tuned_folder: Path, fails: Fails, tmp_path: Path
    ) -> None:
        file = tmp_path / "moments.safetensors"
        arguments = ("extract", bert_folder, tuned_folder, "--out", tmp_path / "out")
        arguments += ("--moments", file)
        assert "not a whole safetensors file" in fails("--moments", *arguments)
        save_file({"nowhere": torch.eye(3)}, file)
        assert "not extracted, such as 'nowhere'" in fails("--moments", *arguments)
        save_file({"pooler.dense": torch.eye(3)}, file)
        assert "must have shape (16, 16)" in fails("--moments", *arguments)

    def test_a_target_that_cannot_be_written(
        self, bert_folder: Path, tuned_folder: Path, fails: Fails, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "out"
        said = fails("--out", "extract", bert_folder, tuned_folder, "--out", out)
        assert "is a file, not a folder" in said
