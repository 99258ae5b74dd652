"""From a full fine-tune to an adapter, against dense SVDs taken here."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tuned_models import Folders, perturbed, put

from gauge_ext import load_adapter
from gauge_ext.checkpoint import Extraction, extract, input_moments, read_adapter
from gauge_ext.checkpoint.weights import FolderWeights, StateWeights
from gauge_ext.errors import TargetError
from gauge_ext.geometry import low_rank


def test_each_layer_gets_the_best_update_of_its_rank(folders: Folders, mlp: nn.Module) -> None:
    found = extract(*folders, rank=3)
    base, tuned = (FolderWeights(folder) for folder in folders)
    assert set(found.adapter.tensors) == {"up", "block.down"}
    for layer in found.layers:
        key = f"{layer.name}.weight"
        d = tuned.whole(key).double() - base.whole(key).double()
        s = torch.linalg.svdvals(d).square()
        pair = found.adapter.tensors[layer.name]
        assert pair.lora_A.dtype == torch.float32
        error = (d - pair.lora_B.double() @ pair.lora_A.double()).square().sum()
        assert float(error / s.sum()) == pytest.approx(float(s[3:].sum() / s.sum()), rel=0.02)
        assert layer.unexplained == pytest.approx(float(error / s.sum()), rel=1e-4)
        assert layer.norm == pytest.approx(float(d.norm()))
        assert layer.relative == pytest.approx(float(d.norm() / base.whole(key).double().norm()))
        assert (layer.rank, layer.shape) == (3, tuple(d.shape))
        assert found.adapter.config.scaling_for(layer.name) == 1.0
    total = sum(layer.norm**2 for layer in found.layers)
    lost = sum(layer.unexplained * layer.norm**2 for layer in found.layers)
    assert found.unexplained == pytest.approx(lost / total)
    assert found.left_out == {}


def test_a_change_of_low_rank_comes_back_whole_through_a_file(
    mlp: nn.Module, tmp_path: Path
) -> None:
    tuned = perturbed(mlp, rank=2)
    found = extract(mlp, tuned, rank=8)
    # Nothing of rounding is kept as a direction of its own, but float32 has some.
    assert found.unexplained < 1e-10
    found.save(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").sha256 == found.adapter.sha256
    x = torch.randn(4, 12)
    loaded = load_adapter(copy.deepcopy(mlp), tmp_path / "adapter")
    torch.testing.assert_close(loaded(x), tuned(x), rtol=1e-4, atol=1e-5)


def test_peft_reads_what_is_extracted(bert: nn.Module, token_ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = perturbed(bert, rank=2)
    found = extract(bert, tuned, energy=1.0 - 1e-9, rank=5, exclude_modules=["pooler.dense"])
    folder = found.save(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bert), folder)
    tuned.pooler.dense.weight.data.copy_(bert.pooler.dense.weight)
    expected = tuned.eval()(token_ids).last_hidden_state
    actual = loaded.eval()(token_ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_folder_and_a_module_give_the_same(folders: Folders, mlp: nn.Module) -> None:
    from_folders = extract(*folders, rank=3)
    from_modules = extract(mlp, perturbed(mlp), rank=3)
    assert from_folders.adapter.sha256 == from_modules.adapter.sha256
    assert from_folders.adapter.config.base_model_name_or_path == str(folders[0])


def test_the_energy_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(20, 20) for name in ("a", "b", "c")})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for rank, name in ((1, "a"), (3, "b"), (7, "c")):
            q = torch.linalg.qr(torch.randn(20, rank)).Q
            tuned[name].weight += q @ q.T
    found = extract(base, tuned, rank=None, energy=0.999)
    assert {layer.name: layer.rank for layer in found.layers} == {"a": 1, "b": 3, "c": 7}
    assert all(layer.unexplained <= 0.001 for layer in found.layers)
    found.save(tmp_path / "adapter")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert [loaded[name].rank for name in "abc"] == [1, 3, 7]
    assert {loaded[name].scaling for name in "abc"} == {1.0}
    capped = extract(base, tuned, rank=2, energy=0.999)
    assert {layer.name: layer.rank for layer in capped.layers} == {"a": 1, "b": 2, "c": 2}


def test_inputs_make_the_outputs_better(mlp: nn.Module) -> None:
    tuned = perturbed(mlp)
    inputs = torch.randn(200, 12) * torch.logspace(0, -2, 12)
    moments = input_moments(mlp.eval(), [inputs[:100], inputs[100:]])
    torch.testing.assert_close(moments["up"], inputs.double().T @ inputs.double() / 200)
    plain = extract(mlp, tuned, rank=2)
    weighted = extract(mlp, tuned, rank=2, covariances=moments)
    by_rows = extract(mlp, tuned, rank=2, activations={"up": inputs})

    change = (tuned.up.weight - mlp.up.weight).detach().double()
    rows = inputs.double().T

    def error(found: Extraction) -> float:
        pair = found.adapter.tensors["up"]
        left = change - pair.lora_B.double() @ pair.lora_A.double()
        return float((left @ rows).square().sum() / (change @ rows).square().sum())

    assert error(weighted) < 0.8 * error(plain)
    assert error(by_rows) == pytest.approx(error(weighted), rel=1e-3)
    layer = weighted.layers[0]
    assert layer.unexplained_output == pytest.approx(error(weighted), rel=1e-3)
    assert layer.unexplained > plain.layers[0].unexplained
    assert plain.layers[0].unexplained_output is None
    assert by_rows.layers[1].unexplained_output is None


def test_what_has_no_place_in_an_adapter_is_named(mlp: nn.Module) -> None:
    tuned = copy.deepcopy(mlp)
    with torch.no_grad():
        tuned.up.weight += 0.1
        tuned.up.bias *= 1.5
    tuned.register_buffer("extra", torch.ones(2))
    for steps, model in enumerate((mlp, tuned)):
        model.register_buffer("steps", torch.tensor(steps))
    found = extract(mlp, tuned, rank=4)
    assert found.left_out == {
        "up.bias": "changed by 0.5 of its norm",
        "steps": "changed",
        "extra": f"only in {type(mlp).__name__}",
    }
    assert found.unchanged == ("block.down",)
    assert found.layers[0].unexplained < 1e-10
    assert found.to_dict()["left_out"] == found.left_out


def test_embeddings_and_tied_heads_are_no_linear_layers(llama: nn.Module, tmp_path: Path) -> None:
    tuned = perturbed(llama)
    with torch.no_grad():
        tuned.get_input_embeddings().weight += 0.1
    llama.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert len(found.layers) == 14
    assert all(layer.name.startswith("model.layers.") for layer in found.layers)
    assert list(found.left_out) == ["model.embed_tokens.weight"]
    load_adapter(copy.deepcopy(llama), found.save(tmp_path / "adapter"))


def test_a_prefix_more_or_less_is_no_hindrance(mlp: nn.Module, tmp_path: Path) -> None:
    bare = put(mlp, tmp_path / "base")
    wrapped = put(perturbed(mlp), tmp_path / "tuned", prefix="model.")
    there = extract(bare, wrapped, rank=2)
    back = extract(wrapped, bare, rank=2)
    assert set(there.adapter.tensors) == {"up", "block.down"}
    assert set(back.adapter.tensors) == {"model.up", "model.block.down"}
    # The paths of the model's classes are what the adapter is named after.
    named = extract(wrapped, bare, rank=2, linear=["up", "block.down"])
    assert set(named.adapter.tensors) == {"up", "block.down"}


def test_only_the_targets_are_adapted(folders: Folders) -> None:
    assert set(extract(*folders, target_modules=["down"]).adapter.tensors) == {"block.down"}
    assert set(extract(*folders, target_modules=r"u.").adapter.tensors) == {"up"}
    assert set(extract(*folders, exclude_modules=["up"]).adapter.tensors) == {"block.down"}
    with pytest.raises(TargetError, match="'dwn' mean no linear layer.*may be 'down'"):
        extract(*folders, target_modules=["dwn"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_bases(mlp: nn.Module, dtype: torch.dtype) -> None:
    base = copy.deepcopy(mlp).to(dtype)
    tuned = perturbed(mlp).to(dtype)
    found = extract(base, tuned, rank=12)
    d = tuned.up.weight.double() - base.up.weight.double()
    pair = found.adapter.tensors["up"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert pair.lora_B.dtype == wide
    torch.testing.assert_close(pair.lora_B.double() @ pair.lora_A.double(), d, rtol=0, atol=1e-6)
    narrow = extract(base, tuned, rank=2, dtype=torch.bfloat16)
    assert narrow.adapter.tensors["up"].lora_A.dtype == torch.bfloat16


def test_no_layer_is_ever_whole_in_memory(
    folders: Folders, mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's name for it is the function.
    extract_module = importlib.import_module("gauge_ext.checkpoint.extracting")
    monkeypatch.setattr(low_rank, "_BLOCK_BYTES", 8 * 12 * 4)
    monkeypatch.setattr(extract_module, "_BLOCK_NUMBERS", 12 * 4)
    read: list[int] = []
    base, tuned = (FolderWeights(folder) for folder in folders)
    for weights in (base, tuned):
        rows = weights.rows

        def watched(name: str, start: int, stop: int, rows: Callable[..., Tensor] = rows) -> Tensor:
            found = rows(name, start, stop)
            read.append(found.numel())
            return found

        monkeypatch.setattr(weights, "rows", watched)
        monkeypatch.setattr(weights, "whole", None)
    assert set(extract(base, tuned, rank=2).adapter.tensors) == {"up", "block.down"}
    assert max(read) <= 12 * 4 < mlp.up.weight.numel()


def test_the_models_in_memory_are_left_alone(mlp: nn.Module) -> None:
    base, tuned = mlp.double(), perturbed(mlp.double())
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    extract(base, tuned, rank=2)
    for state, model in zip(before, (base, tuned), strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_progress_ends_at_one(folders: Folders) -> None:
    said: list[tuple[str, float]] = []
    extract(*folders, rank=2, progress=lambda what, share: said.append((what, share)))
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert said[-1] == ("done", 1.0)


def test_state_dicts_serve_as_weights(mlp: nn.Module) -> None:
    tuned = perturbed(mlp)
    named = StateWeights(tuned.state_dict(), "tuned")
    assert extract(mlp, named, rank=2).layers == extract(mlp, tuned, rank=2).layers
