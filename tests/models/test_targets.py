"""Which modules a config means, and what is said where it means none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import TargetError
from gauge_ext.models import find_targets


def names(model: nn.Module, **fields: Any) -> list[str]:
    return list(find_targets(model, LoRAConfig(**fields)).layers)


def test_names_expressions_and_all_linear(mlp: nn.Module) -> None:
    assert names(mlp) == ["up", "block.down"]
    assert names(mlp, target_modules=["down"]) == ["block.down"]
    assert names(mlp, target_modules=["block.down", "up"]) == ["up", "block.down"]
    assert names(mlp, target_modules=r".*down|u.") == ["up", "block.down"]
    assert names(mlp, exclude_modules=["down"]) == ["up"]
    assert names(mlp, target_modules=["up", "down"], exclude_modules=".*own") == ["up"]


def test_layers_to_transform(bert: nn.Module) -> None:
    assert names(bert, target_modules=["query"], layers_to_transform=1) == [
        "encoder.layer.1.attention.self.query"
    ]
    assert names(
        bert, target_modules=["query"], layers_to_transform=[0, 7], layers_pattern="layer"
    ) == ["encoder.layer.0.attention.self.query"]


def test_all_linear_leaves_out_the_output_embedding(llama: nn.Module) -> None:
    match = find_targets(llama, LoRAConfig())
    assert len(match.layers) == 14
    assert match.skipped == {"lm_head": "it is the output embedding"}
    assert match.unmatched == ()
    # Inside a wrapper that knows nothing of embeddings it is the same layer.
    wrapped = find_targets(nn.ModuleDict({"lm": llama}), LoRAConfig())
    assert wrapped.skipped == {"lm.lm_head": "it is the output embedding"}
    # By name it can be had.
    assert names(llama, target_modules=["lm_head"]) == ["lm_head"]


def test_all_linear_leaves_out_what_shares_an_embeddings_weight() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    match = find_targets(model, LoRAConfig())
    assert list(match.layers) == ["mix"]
    assert match.skipped == {"head": "it shares its weight with the embedding 'embed'"}


def test_all_linear_leaves_out_the_head_of_a_sequence_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = transformers.BertForSequenceClassification(config)
    match = find_targets(model, LoRAConfig(task_type="SEQ_CLS"))
    assert match.skipped == {"classifier": "it is the classifier's head"}
    assert "classifier" in find_targets(model, LoRAConfig()).layers


@pytest.mark.parametrize("which", ["bert", "llama"])
def test_all_linear_means_what_it_means_to_peft(which: str, request: pytest.FixtureRequest) -> None:
    peft = pytest.importorskip("peft")
    model = request.getfixturevalue(which)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(names(model)) == adapted


class Subclass(nn.Linear):
    """Has a name of its own."""


def test_what_cannot_carry_an_adapter_is_refused_by_name_and_skipped_by_all_linear() -> None:
    model = nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "own": Subclass(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm(4),
        }
    )
    match = find_targets(model, LoRAConfig())
    assert list(match.layers) == ["good"]
    assert set(match.skipped) == {"own", "attention.out_proj"}
    assert "Subclass is a subclass of nn.Linear" in match.skipped["own"]
    assert "nn.MultiheadAttention reads the weight" in match.skipped["attention.out_proj"]
    for target, words in (
        ("own", "Subclass is a subclass of nn.Linear"),
        ("out_proj", "nn.MultiheadAttention reads the weight of its out_proj"),
        ("norm", "torch.nn.modules.normalization.LayerNorm, and supported are nn.Linear"),
    ):
        with pytest.raises(TargetError) as caught:
            find_targets(model, LoRAConfig(target_modules=["good", target]))
        assert words in str(caught.value)
        assert f"{target}', which cannot carry" in str(caught.value)
        assert "exclude_modules" in str(caught.value.hint)


def test_a_container_is_refused_with_the_layers_inside_it(bert: nn.Module) -> None:
    with pytest.raises(TargetError) as caught:
        find_targets(bert, LoRAConfig(target_modules=["self"]))
    assert "'encoder.layer.0.attention.self', which cannot carry an adapter" in str(caught.value)
    assert caught.value.hint == "Name the layers inside it: query, key, value."


def test_conv1d_of_transformers_counts_as_linear() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )
    assert list(find_targets(model, LoRAConfig(target_modules=["c_attn"])).layers) == [
        "h.0.attn.c_attn"
    ]
    expected = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(find_targets(model, LoRAConfig()).layers) == [f"h.0.{name}" for name in expected]


def test_no_match_names_what_is_near(bert: nn.Module) -> None:
    with pytest.raises(TargetError) as caught:
        find_targets(bert, LoRAConfig(target_modules=["qeury", "v_proj"]))
    message = str(caught.value)
    assert "target_modules ['qeury', 'v_proj'] matches no module of BertModel" in message
    assert "'qeury' may be 'query'" in message
    assert "Its layers end in: query, key, value, dense." in message


def test_names_that_match_nothing_are_told_beside_those_that_do(bert: nn.Module) -> None:
    match = find_targets(bert, LoRAConfig(target_modules=["query", "q_proj"]))
    assert match.unmatched == ("q_proj",)
    assert len(match.layers) == 2


def test_the_limits_are_named_where_they_leave_nothing(mlp: nn.Module, bert: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"with exclude_modules='\.\*'"):
        find_targets(mlp, LoRAConfig(exclude_modules=".*"))
    with pytest.raises(TargetError, match=r"layers_to_transform=\(9,\)"):
        find_targets(bert, LoRAConfig(target_modules=["query"], layers_to_transform=[9]))


def test_models_without_names_or_layers() -> None:
    with pytest.raises(TargetError, match=r"the model itself is an? Linear layer.*nn\.Sequential"):
        find_targets(nn.Linear(3, 2), LoRAConfig())
    with pytest.raises(TargetError, match=r"The model has no layer that can"):
        find_targets(nn.ReLU(), LoRAConfig())


def test_a_layer_that_is_reached_twice_is_one_target() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert names(model) == ["a"]


def test_mambas_out_proj_is_refused_as_peft_does() -> None:
    model = nn.ModuleDict({"in_proj": nn.Linear(3, 3), "out_proj": nn.Linear(3, 3)})
    model.config = type("Config", (), {"model_type": "mamba2"})()  # type: ignore[assignment]
    assert "fused kernels of mamba2" in find_targets(model, LoRAConfig()).skipped["out_proj"]
    with pytest.raises(TargetError, match="fused kernels of mamba2"):
        find_targets(model, LoRAConfig(target_modules=["out_proj"]))


def test_integer_weights_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    match = find_targets(model, LoRAConfig())
    assert list(match.layers) == ["0"]
    assert "torch.int8" in match.skipped["1"]
