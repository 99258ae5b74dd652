"""What "all-linear" means where experts are stacked weights: PEFT's targets, and what we leave out.

PEFT 0.21 turns "all-linear" into target_parameters for experts and router, of twice the rank where
two matrices were fused, on those types of model that a table of transformers 5 lists: Mixtral and
Qwen3-MoE, but not Qwen2-MoE. Here no type of model is special: what is no linear layer is named.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext import LoRAConfig
from gauge_ext.models import attachment, find_targets, lora_layers

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.21")

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": MOE,
    "Qwen3Moe": MOE,
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
PEFT_TAKES_EXPERTS = {"Mixtral", "Qwen3Moe", "Olmoe"}
EXPERTS = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def of_peft(model: nn.Module) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """PEFT's config after the conversion, and path of each adapted weight -> shape of its A."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    theirs = peft.get_peft_model(model, config)
    found: dict[str, tuple[int, ...]] = {}
    for path, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "lora_A") or not len(module.lora_A):
            continue
        parameter = getattr(module, "parameter_name", None)
        holder = path.replace(".base_layer", "")
        name = holder if parameter is None else f"{holder}.{parameter}"
        found[name] = tuple(module.lora_A["default"].weight.shape)
    return config, found


def ours(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        path.replace(".lora_", "."): tuple(layer.lora_A.shape)
        for path, layer in lora_layers(model).items()
    }


# PEFT says that it cannot tell what the doubled ranks mean in a list.
@pytest.mark.filterwarnings(r"ignore:The following \w+_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", MODELS)
def test_the_difference_to_peft_is_experts_and_routers_and_said(name: str) -> None:
    _, theirs = of_peft(build(name))
    model = build(name)
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out \d+ weights of experts') as said:
        gauge_ext.attach(model, LoRAConfig(rank=2))
    experts = {f"model.layers.{i}.mlp.{entry}" for i in range(2) for entry in EXPERTS}
    assert set(find_targets(build(name), LoRAConfig(rank=2)).bare_experts) == experts
    assert not experts & ours(model).keys()
    assert theirs.keys() - ours(model).keys() == (experts if name in PEFT_TAKES_EXPERTS else set())
    assert not ours(model).keys() - theirs.keys()
    assert all("target_parameters" in attachment(model).skipped[path] for path in experts)
    assert all(re.search(rf"'[\w.]*{entry}'", str(said[0].message)) for entry in EXPERTS)


@pytest.mark.filterwarnings(r"ignore:The following \w+_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", sorted(PEFT_TAKES_EXPERTS))
def test_named_they_are_peft_s_very_targets_and_shapes(name: str) -> None:
    config, theirs = of_peft(build(name))
    model = build(name)
    fields: dict[str, Any] = {
        "target_parameters": EXPERTS,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    gauge_ext.attach(model, LoRAConfig(rank=2, alpha=4, **fields))
    assert ours(model) == theirs


def test_what_is_excluded_is_not_spoken_of() -> None:
    gauge_ext.attach(build("Mixtral"), LoRAConfig(rank=2, exclude_modules=r".*\.(experts|gate)"))
    chosen = LoRAConfig(rank=2, target_parameters=["experts.down_proj"])
    assert {
        path.rpartition(".")[2] for path in find_targets(build("Mixtral"), chosen).bare_experts
    } == {
        "gate_up_proj",
        "weight",
    }
