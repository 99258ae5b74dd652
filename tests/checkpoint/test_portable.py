"""Adapters for readers that look at little of the config; and pickles, on request alone."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import gauge_ext
from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import load_adapter, read_adapter, save_adapter
from gauge_ext.errors import AdapterFormatError, ConfigError


def adapted(model: nn.Module, **fields: object) -> nn.Module:
    options = {"rank": 3, "alpha": 5, "use_rslora": True, "rank_pattern": {"down": 2}}
    gauge_ext.attach(model, LoRAConfig(**(options | fields)))
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.4)
    return model


def test_one_rank_no_scaling_and_the_same_output(mlp: nn.Module, tmp_path: Path) -> None:
    base, x = copy.deepcopy(mlp), torch.randn(4, 12)
    adapted(mlp)
    save_adapter(mlp, tmp_path, portable=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["up", "down"]
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    # A reader that knows nothing of the config: W + B A.
    with torch.no_grad():
        twin = copy.deepcopy(base)
        for name in ("up", "block.down"):
            a, b = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
            assert a.shape[0] == b.shape[1] == 3
            twin.get_submodule(name).weight += b @ a
        torch.testing.assert_close(twin(x), mlp(x))
    torch.testing.assert_close(load_adapter(base, tmp_path)(x), mlp(x))


def test_what_is_more_than_two_factors_is_refused(mlp: nn.Module, tmp_path: Path) -> None:
    adapted(mlp, use_dora=True)
    with pytest.raises(ConfigError, match="up cannot be saved with portable=True.*lora_magnitude"):
        save_adapter(mlp, tmp_path / "a", portable=True)
    gauge_ext.detach(mlp)
    adapted(mlp, bias="lora_only")
    with pytest.raises(ConfigError, match="1 parameters were trained whole, such as 'up.bias'"):
        save_adapter(mlp, tmp_path / "a", portable=True)
    assert not (tmp_path / "a").exists()


def test_a_pickle_is_read_on_request_and_runs_nothing(mlp: nn.Module, tmp_path: Path) -> None:
    base, x = copy.deepcopy(mlp), torch.randn(4, 12)
    save_adapter(adapted(mlp), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="allow_pickle=True"):
        load_adapter(copy.deepcopy(base), tmp_path)
    loaded = load_adapter(base, tmp_path, allow_pickle=True)
    torch.testing.assert_close(loaded(x), mlp(x))
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> object:
            return Path.touch, (ran,)

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
    with pytest.raises(AdapterFormatError, match="cannot be read as tensors alone"):
        read_adapter(tmp_path, allow_pickle=True)
    assert not ran.exists()
    torch.save([1, 2], tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="must hold tensors by name, got list"):
        read_adapter(tmp_path, allow_pickle=True)
