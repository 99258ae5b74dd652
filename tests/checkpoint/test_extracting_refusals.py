"""What no adapter is extracted from, and what is not written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from tuned_models import Folders, perturbed, put

from gauge_ext.checkpoint import InputsError, extract, input_moments, write_adapter
from gauge_ext.errors import (
    AdapterMismatchError,
    ConfigError,
    NonFiniteError,
    TargetError,
    WriteError,
)


class TestItRefuses:
    def test_the_same_model_twice(self, folders: Folders) -> None:
        with pytest.raises(AdapterMismatchError, match="do not differ"):
            extract(folders[0], folders[0])

    def test_another_model(self, folders: Folders, bert: nn.Module) -> None:
        with pytest.raises(AdapterMismatchError, match="has none of the 2 linear layers"):
            extract(folders[0], bert)

    def test_another_width(self, mlp: nn.Module, make_mlp: Callable[..., nn.Module]) -> None:
        with pytest.raises(AdapterMismatchError, match=r"shape \(20, 12\).*\(24, 12\)"):
            extract(mlp, make_mlp(hidden=24))

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan(self, mlp: nn.Module, side: int) -> None:
        models = [mlp, perturbed(mlp)]
        with torch.no_grad():
            models[side].up.weight[3, 3] = float("nan")
        with pytest.raises(NonFiniteError, match=r"up\.weight"):
            extract(*models)

    def test_inputs_that_do_not_fit(self, mlp: nn.Module) -> None:
        tuned = perturbed(mlp)
        eye = torch.eye(12)
        for wrong in (
            {"activations": {"nowhere": eye}},
            {"activations": {"up": torch.ones(4, 5)}},
            {"covariances": {"up": torch.ones(11, 12)}},
            {"covariances": {"up": -eye}},
            {"covariances": {"up": torch.full((12, 12), torch.nan)}},
            {"covariances": {"up": eye}, "activations": {"up": eye}},
        ):
            with pytest.raises(InputsError, match="nowhere|'up'"):
                extract(mlp, tuned, **wrong)  # type: ignore[arg-type]

    def test_arguments_out_of_range(self, folders: Folders) -> None:
        for wrong in ({"rank": 0}, {"energy": 2.0}, {"rank": None}, {"dtype": torch.int8}):
            with pytest.raises(ConfigError):
                extract(*folders, **wrong)  # type: ignore[arg-type]

    def test_a_model_with_transposed_weights(self, folders: Folders) -> None:
        (folders[0] / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(ConfigError, match="transposed"):
            extract(*folders)

    def test_a_quantized_model(self, folders: Folders) -> None:
        (folders[0] / "config.json").write_text('{"quantization_config": {}}')
        with pytest.raises(ConfigError, match="quantized"):
            extract(*folders)

    def test_folders_that_cannot_be_read(self, folders: Folders, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no folder"):
            extract(tmp_path / "nowhere", folders[1])
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="has neither"):
            extract(folders[0], tmp_path / "empty")
        (tmp_path / "empty" / "pytorch_model.bin").touch()
        with pytest.raises(ConfigError, match=r"only pytorch_model\.bin"):
            extract(folders[0], tmp_path / "empty")
        shard = next(folders[1].glob("model-*"))
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="not a whole safetensors file"):
            extract(*folders)
        shard.unlink()
        with pytest.raises(ConfigError, match="names the shard"):
            extract(*folders)
        (folders[1] / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(ConfigError, match="JSON object"):
            extract(*folders)

    def test_a_name_that_fits_twice(self, tmp_path: Path, mlp: nn.Module) -> None:
        both = nn.ModuleDict({"one": mlp, "two": perturbed(mlp)})
        with pytest.raises(AdapterMismatchError, match="may be"):
            extract(put(mlp, tmp_path / "base"), put(both, tmp_path / "both"))


def test_moments_come_from_modules_that_exist_and_run(mlp: nn.Module) -> None:
    with pytest.raises(TargetError, match="'tanh' is no nn.Linear"):
        input_moments(mlp, [], ["tanh"])
    with pytest.raises(ConfigError, match="no batches"):
        input_moments(mlp, [])
    assert set(input_moments(mlp, [(torch.ones(2, 3, 12),)], ["up"])) == {"up"}
    assert not mlp.up._forward_pre_hooks


def test_writing_checks_and_is_whole_or_not_at_all(mlp: nn.Module, tmp_path: Path) -> None:
    found = extract(mlp, perturbed(mlp), rank=2)
    wrong = extract(mlp, perturbed(mlp), rank=3)
    with pytest.raises(AdapterMismatchError, match="rank 3, and the config says rank 2"):
        write_adapter(found.adapter.config, wrong.adapter.tensors, tmp_path / "out")
    found.adapter.tensors["up"].lora_A[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="lora_A of up"):
        found.save(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        wrong.save(tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()
    tensors = load_file(wrong.save(tmp_path / "out") / "adapter_model.safetensors")
    assert tensors["base_model.model.up.lora_A.weight"].shape == (3, 12)
