"""From a folder onto a model: what fits, and what is said of what does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    GaugeError,
    TargetError,
)
from gauge_ext.models import (
    adapter_config,
    adapter_parameters,
    attach,
    attachment,
    detach,
    lora_layers,
    merge,
)


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    attach(model, LoRAConfig(**{"rank": 2, "alpha": 3, **fields}))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save an adapter for a copy of a model: ``saved(model, **LoRAConfig's fields)``."""

    def save(model: nn.Module, **fields: Any) -> Path:
        return save_adapter(adapted(copy.deepcopy(model), **fields), tmp_path / "adapter")

    return save


def untouched(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return (
        list(now) == list(before)
        and all(torch.equal(now[name], before[name]) for name in now)
        and all(p.requires_grad for p in model.parameters())
        and not lora_layers(model)
    )


def refused(model: nn.Module, folder: Path, kind: type[GaugeError] = AdapterMismatchError) -> str:
    """Return the message with which a bare model refuses the folder, unchanged."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as caught:
        load_adapter(model, folder)
    assert untouched(model, before)
    return str(caught.value)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_bare_model(mlp: nn.Module, saved: Callable[..., Path], trainable: bool) -> None:
    folder = saved(mlp, target_modules=["down"], dropout=0.2, rank_pattern={"down": 3})
    assert load_adapter(mlp, folder, trainable=trainable) is mlp
    (layer,) = lora_layers(mlp).values()
    assert layer is mlp.block["down"]
    assert (layer.rank, layer.scaling, layer.dropout_p) == (3, 1.0, 0.2)
    pair = read_adapter(folder).tensors["block.down"]
    assert torch.equal(layer.lora_A, pair.lora_A)
    assert torch.equal(layer.lora_B, pair.lora_B)
    flags = {name: p.requires_grad for name, p in mlp.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == (
        {"block.down.lora_A", "block.down.lora_B"} if trainable else set()
    )
    assert adapter_config(mlp).rank_pattern == {"down": 3}
    detach(mlp)
    assert all(p.requires_grad for p in mlp.parameters())


def test_the_factors_get_the_dtype_of_a_fresh_adapter(
    mlp: nn.Module, saved: Callable[..., Path]
) -> None:
    folder = saved(mlp, adapter_dtype=torch.bfloat16)
    for base, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = load_adapter(copy.deepcopy(mlp).to(base), folder)
        assert {p.dtype for p in adapter_parameters(model)} == {expected}
        pair = read_adapter(folder).tensors["up"]
        assert torch.equal(model.up.lora_A, pair.lora_A.to(expected))


def test_adapters_of_the_same_shape_are_filled(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(mlp, alpha=8, dropout=0.1, task_type="CAUSAL_LM")
    adapted(mlp, alpha=1, adapter_dtype=torch.float64)
    parameters = adapter_parameters(mlp)
    trainable = attachment(mlp).trainable
    load_adapter(mlp, folder)
    # An optimizer that holds the parameters goes on training them.
    assert all(p is q for p, q in zip(adapter_parameters(mlp), parameters, strict=True))
    assert {(m.scaling, m.dropout_p) for m in lora_layers(mlp).values()} == {(4.0, 0.1)}
    assert adapter_sha256(mlp) == read_adapter(folder).sha256
    assert adapter_config(mlp).task_type == "CAUSAL_LM"
    assert adapter_config(mlp).adapter_dtype is torch.float64
    assert attachment(mlp).trainable == trainable
    load_adapter(mlp, folder, trainable=False)
    assert not any(p.requires_grad for p in mlp.parameters())


def test_a_compiled_model_counts_as_what_it_wraps(
    mlp: nn.Module, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved(mlp)
    compiled = torch.compile(mlp, backend="eager")
    assert load_adapter(compiled, folder) is compiled
    assert adapter_sha256(mlp) == read_adapter(folder).sha256
    again = save_adapter(compiled, tmp_path / "again")
    assert list(read_adapter(again).tensors) == ["block.down", "up"]


# Shapes and ranks


def test_a_base_of_another_size_names_the_module_and_both_shapes(
    make_mlp: Callable[..., nn.Module], saved: Callable[..., Path]
) -> None:
    folder = saved(make_mlp(12, 20, 5), base_model_name_or_path="org/base")
    message = refused(make_mlp(12, 20, 7), folder)
    assert "the adapter for 'block.down' does not fit" in message
    assert "it has lora_A (2, 20) and lora_B (5, 2)" in message
    assert "weight of shape (7, 20) needs lora_A (2, 20) and lora_B (7, 2)" in message
    assert "Its config names the base org/base, a MLP." in message


def test_a_rank_that_is_not_the_configs_is_refused(
    mlp: nn.Module, saved: Callable[..., Path]
) -> None:
    folder = saved(mlp)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    message = refused(mlp, folder, AdapterFormatError)
    assert "the rank of 'block.down' is 5 by adapter_config.json" in message
    assert "lora_A (2, 20) and lora_B (5, 2)" in message


def test_attached_adapters_of_another_rank_name_both(
    mlp: nn.Module, saved: Callable[..., Path]
) -> None:
    folder = saved(mlp)
    adapted(mlp, rank=4)
    before = copy.deepcopy(mlp.state_dict())
    config = adapter_config(mlp)
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(mlp, folder)
    assert "'up' has rank 4, lora_A (4, 12), and that in" in str(caught.value)
    assert "has rank 2, lora_A (2, 12)" in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in mlp.state_dict().items())
    assert adapter_config(mlp) is config


def test_attached_adapters_on_other_layers_are_told_apart(
    mlp: nn.Module, saved: Callable[..., Path]
) -> None:
    folder = saved(mlp, target_modules=["up"])
    adapted(mlp, target_modules=["down"])
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(mlp, folder)
    assert "it has none for 'block.down'; the model has none at 'up'" in str(caught.value)


def test_merged_adapters_are_not_filled(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(mlp)
    merge(adapted(mlp))
    with pytest.raises(AdapterStateError, match=r"are merged.*'up'.*unmerge\(\)"):
        load_adapter(mlp, folder)


def test_a_part_with_adapters_is_not_the_whole(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(mlp)
    with pytest.raises(AdapterStateError, match="on its submodule 'inner'"):
        load_adapter(nn.ModuleDict({"inner": adapted(mlp)}), folder)


# Another model


def test_an_adapter_for_another_model_lists_what_matched_none(
    bert: nn.Module, llama: nn.Module, saved: Callable[..., Path]
) -> None:
    folder = saved(llama, target_modules=["q_proj"], base_model_name_or_path="org/llama")
    message = refused(bert, folder)
    assert "is for another model: 2 of its 2 modules are not in this BertModel" in message
    assert "'model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj'" in message
    assert "layers end in: query, key, value, dense" in message
    assert "names the base org/llama, a LlamaForCausalLM" in message


def test_some_keys_that_match_none_are_enough(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(mlp)
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.upp.lora_A.weight"] = torch.ones(2, 12)
    tensors["base_model.model.upp.lora_B.weight"] = torch.ones(20, 2)
    safetensors.torch.save_file(tensors, file)
    message = refused(mlp, folder)
    assert "1 of its 3 modules are not in this MLP: 'upp'" in message
    assert "'upp' may be 'up'" in message


def test_an_adapter_of_a_part_says_which_part(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(mlp)
    message = refused(nn.ModuleDict({"head": nn.Linear(3, 3), "inner": mlp}), folder)
    assert "They all fit the submodule 'inner': pass that to load_adapter." in message


def test_an_adapter_of_a_whole_says_so(mlp: nn.Module, saved: Callable[..., Path]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(mlp)

    folder = saved(Outer())
    message = refused(mlp, folder)
    assert "They would all fit without 'inner' in front" in message
    assert "names the base Outer" in message


def test_layers_without_weights_are_missed(bert: nn.Module, saved: Callable[..., Path]) -> None:
    folder = saved(bert, target_modules=["query", "value"])
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    kept = {key: tensor for key, tensor in tensors.items() if ".layer.1." not in key}
    safetensors.torch.save_file(kept, file)
    message = refused(bert, folder)
    assert "mean 2 more layers of this BertModel than the file has weights for" in message
    assert "'encoder.layer.1.attention.self.query'" in message


def test_a_layer_that_cannot_carry_an_adapter_is_named(saved: Callable[..., Path]) -> None:
    class Block(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)
            self.out_proj = nn.MultiheadAttention(4, 2).out_proj if own else nn.Linear(4, 4)

    folder = saved(Block(own=False))
    message = refused(Block(own=True), folder, TargetError)
    assert "an adapter for 'out_proj', which cannot carry one: nn.MultiheadAttention" in message


def test_a_failure_in_the_middle_leaves_a_bare_model(
    mlp: nn.Module, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(mlp)
    before = copy.deepcopy(mlp.state_dict())

    def failing(*arguments: object, **options: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("gauge_ext.checkpoint.load._fill", failing)
    with pytest.raises(MemoryError):
        load_adapter(mlp, folder)
    assert untouched(mlp, before)


def test_onto_a_base_whose_weights_come_later(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    torch.manual_seed(0)
    base = build()
    model = attach(copy.deepcopy(base), LoRAConfig(rank=2, use_dora=True))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = build()
    load_adapter(empty, tmp_path, trainable=False)
    assert all(parameter.is_meta is ("lora" not in n) for n, parameter in empty.named_parameters())
    x = torch.randn(3, 6)
    missing = empty.load_state_dict(base.state_dict(), assign=True, strict=False).missing_keys
    assert all("lora_" in name for name in missing)
    assert not any(p.requires_grad for p in adapter_parameters(empty))
    torch.testing.assert_close(empty(x), model(x))


def test_whole_parameters_are_not_lost_in_a_base_whose_weights_come_later(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))

    config = LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"])
    save_adapter(attach(build(), config), tmp_path)
    with torch.device("meta"):
        empty = build()
    with pytest.raises(AdapterStateError, match=r"'1\.(bias|weight)'.*meta device.*weights first"):
        load_adapter(empty, tmp_path)
    assert type(empty[0]) is nn.Linear
