"""What is written, that it means the same to every reader, and that it is all or nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.checkpoint import load_adapter, read_adapter, save_adapter
from gauge_ext.checkpoint.describing import describe
from gauge_ext.errors import AdapterStateError, ConfigError, NonFiniteError, WriteError
from gauge_ext.models import adapter_parameters, attach, detach, find_targets, merge


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 3, **fields}))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_files_by_hand(mlp: nn.Module, tmp_path: Path) -> None:
    adapted(mlp, dropout=0.05, task_type="FEATURE_EXTRACTION", base_model_name_or_path="org/base")
    folder = tmp_path / "adapter"
    assert save_adapter(mlp, str(folder)) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sorted(tensors) == [
        "base_model.model.block.down.lora_A.weight",
        "base_model.model.block.down.lora_B.weight",
        "base_model.model.up.lora_A.weight",
        "base_model.model.up.lora_B.weight",
    ]
    assert torch.equal(tensors["base_model.model.up.lora_A.weight"], mlp.up.lora_A)
    config = config_of(folder)
    assert {name: config[name] for name in ("r", "lora_alpha", "lora_dropout", "peft_type")} == {
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
    }
    assert config["inference_mode"] is True
    assert config["auto_mapping"] is None  # the task says which class it is
    assert sorted(config["target_modules"]) == ["down", "up"]
    card = (folder / "README.md").read_text()
    assert 'base_model: "org/base"' in card
    assert "- Rank: 2\n- Alpha: 3\n- Parameters: 114\n" in card  # 2 * (12 + 20) + 2 * (20 + 5)


def test_the_class_and_the_place_of_the_base_are_noted(bert: nn.Module, tmp_path: Path) -> None:
    bert.name_or_path = "/models/bert: base"
    save_adapter(adapted(bert), tmp_path)
    config = config_of(tmp_path)
    assert config["auto_mapping"] == {
        "base_model_class": "BertModel",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    assert config["base_model_name_or_path"] == "/models/bert: base"
    assert 'base_model: "/models/bert: base"' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("merged", [False, True])
def test_round_trip(bert: nn.Module, token_ids: Tensor, tmp_path: Path, merged: bool) -> None:
    base = copy.deepcopy(bert)
    adapted(bert, rank_pattern={"query": 4}, alpha_pattern={"key": 7.5}, use_rslora=True)
    expected = bert(token_ids).last_hidden_state
    if merged:
        merge(bert)
    save_adapter(bert, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(token_ids).last_hidden_state, expected)


def test_loading_and_saving_again_changes_no_byte(
    llama: nn.Module, make_peft_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_peft_adapter(
        llama, r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", revision="v3"
    )
    save_adapter(load_adapter(llama, folder), tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        theirs, ours = (f / name for f in (folder, tmp_path / "again"))
        if name.endswith(".json"):  # PEFT's sets of names come out in any order
            theirs, ours = (json.loads(f.read_text()) for f in (theirs, ours))
            for config in (theirs, ours):
                config["target_modules"].sort()
            assert ours == theirs
        else:
            with safetensors.safe_open(theirs, "pt") as a, safetensors.safe_open(ours, "pt") as b:
                assert set(a.keys()) == set(b.keys())
                assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in a.keys())  # noqa: SIM118


def test_an_adapter_is_replaced_and_other_files_stay(mlp: nn.Module, tmp_path: Path) -> None:
    save_adapter(adapted(mlp), tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    first = read_adapter(tmp_path)
    with torch.no_grad():
        mlp.up.lora_B.mul_(2)
    save_adapter(mlp, tmp_path)
    second = read_adapter(tmp_path)
    assert torch.equal(second.tensors["up"].lora_B, 2 * first.tensors["up"].lora_B)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert (tmp_path / "optimizer.pt").read_bytes() == b"state"
    assert len(list(tmp_path.iterdir())) == 4


# Targets


def test_targets_are_kept_where_they_are_exact(bert: nn.Module, tmp_path: Path) -> None:
    for number, targets in enumerate((["query", "value"], r".*\.(query|value)")):
        folder = tmp_path / str(number)
        save_adapter(adapted(bert, target_modules=targets), folder)
        assert config_of(folder)["target_modules"] == targets
        detach(bert)
    fields = {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}
    save_adapter(adapted(bert, **fields), tmp_path)
    assert {name: config_of(tmp_path)[name] for name in fields} == fields


class Odd(nn.Module):
    """``proj`` lies at the root and in a block, and in the block it is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"proj": nn.Conv1d(4, 4, 1), "mix+": nn.Linear(4, 4)})


def test_all_linear_is_spelled_out_for_every_reader(llama: nn.Module) -> None:
    targets = {
        "llama": describe(llama, LoRAConfig(), find_targets(llama, LoRAConfig()).layers),
        "odd": describe(Odd(), LoRAConfig(), ["proj", "block.mix+"]),
    }
    assert set(targets["llama"].target_modules) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    # "proj" as a name would mean the convolution too.
    assert targets["odd"].target_modules == r"proj|block\.mix\+"
    assert list(find_targets(Odd(), targets["odd"]).layers) == ["proj", "block.mix+"]


def test_whole_paths_are_used_where_the_ends_are_not_exact(bert: nn.Module) -> None:
    layers = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.key"]
    config = describe(bert, LoRAConfig(), layers)
    assert config.target_modules == tuple(layers)
    assert list(find_targets(bert, config).layers) == layers


def test_layers_that_were_taken_off_by_hand_are_not_promised(
    mlp: nn.Module, make_mlp: Callable[[], nn.Module], tmp_path: Path
) -> None:
    adapted(mlp, target_modules=["up", "down"])
    mlp.up.to_base()
    save_adapter(mlp, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["down"]
    load_adapter(make_mlp(), tmp_path)


# What cannot be written


def test_without_adapters_there_is_nothing_to_save(mlp: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="no adapters are attached"):
        save_adapter(mlp, tmp_path / "adapter")
    LoRALinear.from_linear(mlp.up)
    with pytest.raises(AdapterStateError, match="no adapters are attached"):
        save_adapter(mlp, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_what_is_not_finite_is_not_saved(mlp: nn.Module, tmp_path: Path, factor: str) -> None:
    adapted(mlp)
    with torch.no_grad():
        getattr(mlp.up, factor)[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"{factor} of up holds NaN"):
        save_adapter(mlp, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_its_config_does_not_describe_is_not_saved(
    mlp: nn.Module, tmp_path: Path
) -> None:
    adapted(mlp)
    mlp.up.scaling = 9.0
    with pytest.raises(AdapterStateError, match=r"up has rank 2 and scaling 9\.0, but its config"):
        save_adapter(mlp, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"x": object()}, "extra must hold what JSON can"),
        ({"use_qalora": True}, "use_qalora = True"),
    ],
)
def test_extra_must_be_json_and_honest(
    mlp: nn.Module, tmp_path: Path, extra: dict[str, Any], words: str
) -> None:
    adapted(mlp, extra=extra)
    with pytest.raises(ConfigError, match=re.escape(words)):
        save_adapter(mlp, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills_up_leaves_the_old_adapter(
    make_mlp: Callable[..., nn.Module],
    small_files: Callable[[int], AbstractContextManager[None]],
    tmp_path: Path,
    exists: bool,
) -> None:
    model = adapted(make_mlp(200, 200))  # more than 4096 bytes
    folder = tmp_path / "adapter"
    if exists:
        save_adapter(model, folder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with torch.no_grad():
        model.up.lora_B.mul_(2)
    with small_files(4096), pytest.raises(WriteError, match="could not be written"):
        save_adapter(model, folder)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert folder.exists() is exists


def test_a_target_that_cannot_be_written(mlp: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"f")
    adapted(mlp)
    for path in (tmp_path / "file", tmp_path / "file" / "adapter"):
        with pytest.raises(WriteError, match="file is a file"):
            save_adapter(mlp, path)
    assert (tmp_path / "file").read_bytes() == b"f"
    assert len(list(tmp_path.iterdir())) == 1


def test_factors_that_share_their_storage_are_saved_apart(mlp: nn.Module, tmp_path: Path) -> None:
    adapted(mlp)
    whole = torch.randn(40, 2)
    mlp.up.lora_B = nn.Parameter(whole[:20])
    mlp.block["down"].lora_A = nn.Parameter(whole[20:].T)
    save_adapter(mlp, tmp_path)
    pairs = read_adapter(tmp_path).tensors
    assert torch.equal(pairs["up"].lora_B, whole[:20])
    assert torch.equal(pairs["block.down"].lora_A, whole[20:].T)
