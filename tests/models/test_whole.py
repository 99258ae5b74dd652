"""Parameters that are trained whole beside the adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import ConfigError, TargetError
from gauge_ext.models import attach, detach, find_targets, merge, whole_parameters


def config(**fields: object) -> LoRAConfig:
    return LoRAConfig(rank=2, target_modules=["up"], **fields)


def test_a_copy_is_trained_and_the_base_comes_back(mlp: nn.Module) -> None:
    base, before = mlp.block["down"].weight, copy.deepcopy(mlp.state_dict())
    attach(mlp, config(modules_to_save=["down"]))
    assert mlp.block["down"].weight is not base
    assert list(whole_parameters(mlp)) == ["block.down.weight"]
    optimizer = torch.optim.SGD(gauge_ext.adapter_parameters(mlp), 0.5)
    mlp(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(mlp.block["down"].weight, before["block.down.weight"])
    assert torch.equal(base, before["block.down.weight"])
    detach(mlp)
    assert mlp.block["down"].weight is base
    assert base.requires_grad


@pytest.mark.parametrize(
    ("bias", "names"),
    [("none", []), ("lora_only", ["up.bias"]), ("all", ["up.bias", "other.bias"])],
)
def test_biases(bias: str, names: list[str]) -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 4), "other": nn.LayerNorm(4)})
    attach(model, config(bias=bias))
    assert list(whole_parameters(model)) == names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"up.lora_A", "up.lora_B", *names}


def test_a_merged_layer_still_tells_its_trained_bias(mlp: nn.Module) -> None:
    attach(mlp, config(bias="lora_only", lora_bias=True))
    nn.init.ones_(mlp.up.lora_bias)
    trained = mlp.up.bias
    merge(mlp)
    assert mlp.up.bias is not trained
    assert whole_parameters(mlp)["up.bias"] is trained


def test_what_is_trained_whole_gets_no_adapter(mlp: nn.Module) -> None:
    match = find_targets(mlp, LoRAConfig(modules_to_save=["block"]))
    assert list(match.layers) == ["up"]
    assert match.skipped == {"block.down": "modules_to_save has it trained whole"}
    named = LoRAConfig(target_modules=["up", "down"], modules_to_save=["down"])
    assert list(find_targets(mlp, named).layers) == ["up"]


def test_names_that_mean_nothing_are_refused(mlp: nn.Module) -> None:
    with pytest.raises(TargetError, match="modules_to_save names 'head'"):
        attach(mlp, config(modules_to_save=["head"]))
    with pytest.raises(ConfigError, match="modules_to_save must be a list"):
        config(modules_to_save="head")
    with pytest.raises(ConfigError, match="bias must be 'none' or 'all' or 'lora_only'"):
        config(bias="some")


def test_a_parameter_that_is_two_stays_two_names_of_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"up": nn.Linear(3, 4), "a": shared, "b": nn.Linear(4, 4)})
    shared_weight = model["b"].weight = shared.weight
    attach(model, config(modules_to_save=["a", "b"]))
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight is not shared_weight


def test_a_warning_tells_of_a_tie_that_comes_apart() -> None:
    model = nn.Sequential()
    model.emb, model.up, model.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    model.head.weight = model.emb.weight
    with pytest.warns(UserWarning, match="'head.weight' gets .* tied to 'emb.weight'"):
        attach(model, config(modules_to_save=["head"]))
    assert model.head.weight is not model.emb.weight
    detach(model)
    assert model.head.weight is model.emb.weight


def test_dora_and_a_bias_of_the_branch_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="use_dora and lora_bias cannot both"):
        LoRAConfig(use_dora=True, lora_bias=True)


def test_what_is_tied_is_trained_along_and_stays_tied(llama: nn.Module) -> None:
    table = llama.model.embed_tokens.weight
    fields = {"rank": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True}
    # Without a warning of what would come apart, which pytest makes an error of.
    attach(llama, LoRAConfig(**fields, modules_to_save=["lm_head"]))
    copy_of_it = llama.lm_head.weight
    assert llama.model.embed_tokens.weight is copy_of_it
    assert copy_of_it is not table
    assert copy_of_it.requires_grad
    assert set(whole_parameters(llama)) == {"model.embed_tokens.weight", "lm_head.weight"}
    detach(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight is table
    # Rows of single tokens are shared with or without it.
    attach(llama, LoRAConfig(**fields, trainable_token_indices=[1, 3]))
    assert list(whole_parameters(llama)) == [
        "model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
