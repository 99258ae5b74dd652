"""Adapters, bases and targets that are not merged on disk, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merged_folders import rewrite

import gauge_ext
from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError, WriteError
from gauge_ext.export import merge_checkpoint
from gauge_ext.export.adapters.file import effective_factors
from gauge_ext.export.patching.adapter_arrays import open_adapter


def test_an_adapter_for_another_model(base, bert, make_peft_adapter, tmp_path):
    adapter = make_peft_adapter(bert, name="bert", r=2, target_modules=["query"])
    with pytest.raises(AdapterMismatchError, match=r"2 of the adapter's 2 modules.*query.*named"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_shape(base, adapter, tmp_path):
    rewrite(base, lambda name, t: t[:, :-1].contiguous() if name.endswith("q_proj.weight") else t)
    with pytest.raises(AdapterMismatchError, match=r"q_proj'.*shape \(16, 16\).*\(16, 15\)"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad, base, adapter, tmp_path, listing):
    before = listing()

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor[3, 4] = bad
        return tensor

    rewrite(base, spoil)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert listing() == before


def test_an_update_beyond_float16(base, adapter, tmp_path):
    rewrite(base, lambda name, t: torch.full_like(t, 65504.0).half())
    rewrite(adapter, lambda name, t: torch.full_like(t, 100.0))
    with pytest.raises(NonFiniteError, match=r"plus its update exceeds the range of float16"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_damaged_and_missing_bases(base, adapter, tmp_path):
    out = tmp_path / "out"
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damaged in (content[:-5], content[:20], b"", b"\xff" * 40, content + b"x"):
        shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{shard.name} is not a whole safetensors file"):
            merge_checkpoint(base, adapter, out)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"names the shard '{shard.name}', which is not in"):
        merge_checkpoint(base, adapter, out)
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        merge_checkpoint(base, adapter, out)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin.*save_pretrained"):
        merge_checkpoint(base, adapter, out)
    with pytest.raises(ConfigError, match="there is no folder"):
        merge_checkpoint(tmp_path / "nowhere", adapter, out)
    assert not out.exists()


def test_an_index_that_points_outside(base, adapter, tmp_path):
    index = base / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../base/model.safetensors"}}')
    with pytest.raises(ConfigError, match="which is not in"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_quantized_bases(base, adapter, tmp_path):
    rewrite(base, lambda name, t: t.to(torch.int8) if name.endswith("q_proj.weight") else t)
    with pytest.raises(ConfigError, match=r"is stored as I8.*unquantized base"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is quantized \(gptq\)"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_targets_that_cannot_be_written(base, adapter, tmp_path):
    with pytest.raises(WriteError, match="not an empty folder"):
        merge_checkpoint(base, adapter, base)
    with pytest.raises(WriteError):
        merge_checkpoint(base, adapter, base / "config.json" / "out")


def test_square_weights_that_may_lie_either_way(base, llama, make_peft_adapter, tmp_path):
    adapter = make_peft_adapter(llama, name="q", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": True}))
    with pytest.raises(ConfigError, match="every weight of it in .* is square"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_bare_parameters_take_the_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    config = gauge_ext.LoRAConfig(target_modules=[], target_parameters=["0.weight"])
    gauge_ext.save_adapter(gauge_ext.attach(model, config), tmp_path)
    with pytest.raises(ConfigError, match=r"target_parameters = \['0.weight'\].*only the model"):
        open_adapter(tmp_path)
    with pytest.raises(AdapterMismatchError, match="no matrices of a linear layer"):
        effective_factors(model)
