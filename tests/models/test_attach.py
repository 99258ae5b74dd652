"""Putting adapters on and off: what changes, what must not, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models import (
    adapter_config,
    adapter_parameters,
    attach,
    attachment,
    detach,
    find_targets,
    is_merged,
    lora_layers,
    merge,
    named_adapter_parameters,
)


def randomized(model: nn.Module) -> nn.Module:
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def test_attach_works_in_place_and_freezes_the_rest(mlp: nn.Module) -> None:
    up, x = mlp.up, torch.randn(4, 12)
    before = mlp(x)
    config = LoRAConfig(rank=3, alpha=6, dropout=0.1, target_modules=["up", "down"])
    assert attach(mlp, config) is mlp
    assert mlp.up is up
    layers = lora_layers(mlp)
    assert not any(layer.delta_weight().any() for layer in layers.values())  # lora_B is zero
    torch.testing.assert_close(mlp(x), before, rtol=1e-6, atol=1e-6)
    assert list(layers) == ["up", "block.down"]
    assert all(type(layer) is LoRALinear for layer in layers.values())
    assert {(layer.rank, layer.scaling, layer.dropout_p) for layer in layers.values()} == {
        (3, 2.0, 0.1)
    }
    trainable = {name for name, p in mlp.named_parameters() if p.requires_grad}
    names = ["up.lora_A", "up.lora_B", "block.down.lora_A", "block.down.lora_B"]
    assert trainable == set(names)
    assert [name for name, _ in named_adapter_parameters(mlp)] == names
    named = [parameter for _, parameter in named_adapter_parameters(mlp)]
    assert all(p is q for p, q in zip(adapter_parameters(mlp), named, strict=True))
    assert adapter_config(mlp) is config
    assert attachment(mlp).names == ("up", "block.down")


def test_ranks_alphas_and_dtypes_by_pattern(bert: nn.Module) -> None:
    attach(
        bert.to(torch.bfloat16),
        LoRAConfig(
            rank=8,
            alpha=8,
            target_modules=["query", "value"],
            rank_pattern={"value": 2, r"layer\.1\.attention\.self\.query": 4},
            alpha_pattern={"value": 6},
        ),
    )
    found = {
        name.replace("encoder.layer.", "").replace(".attention.self", ""): (m.rank, m.scaling)
        for name, m in lora_layers(bert).items()
    }
    assert found == {
        "0.query": (8, 1.0),
        "0.value": (2, 3.0),
        "1.query": (4, 2.0),
        "1.value": (2, 3.0),
    }
    assert all(p.dtype is torch.float32 for p in adapter_parameters(bert))
    detach(bert)
    attach(bert, LoRAConfig(adapter_dtype=torch.bfloat16))
    assert all(p.dtype is torch.bfloat16 for p in adapter_parameters(bert))


@pytest.mark.parametrize("merged", [False, True])
def test_detach_restores_the_model_bit_for_bit(
    bert: nn.Module, token_ids: Tensor, merged: bool
) -> None:
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    parameters = dict(bert.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    bits = {name: t.clone() for name, t in bert.state_dict().items()}
    types = {name: type(m) for name, m in bert.named_modules()}
    attributes = {name: set(vars(m)) for name, m in bert.named_modules()}
    before = bert(token_ids).last_hidden_state
    randomized(attach(bert, LoRAConfig(rank=4)))
    assert not torch.allclose(bert(token_ids).last_hidden_state, before)
    if merged:
        merge(bert)
    assert detach(bert) is bert
    now = dict(bert.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    assert {name: p.requires_grad for name, p in now.items()} == flags
    assert all(torch.equal(t, bits[name]) for name, t in bert.state_dict().items())
    assert {name: type(m) for name, m in bert.named_modules()} == types
    assert {name: set(vars(m)) for name, m in bert.named_modules()} == attributes
    assert torch.equal(bert(token_ids).last_hidden_state, before)
    attach(bert, LoRAConfig(rank=2))


def test_detach_after_the_base_was_given_up_leaves_the_merged_model(mlp: nn.Module) -> None:
    x = torch.randn(4, 12)
    randomized(attach(mlp, LoRAConfig(rank=4)))
    expected = mlp(x)
    detach(merge(mlp, keep_base=False))
    assert type(mlp.up) is nn.Linear
    torch.testing.assert_close(mlp(x), expected)


def test_training_moves_the_adapter_alone(mlp: nn.Module) -> None:
    base = {name: t.clone() for name, t in mlp.state_dict().items()}
    attach(mlp, LoRAConfig(rank=4, alpha=8, dropout=0.1))
    optimizer = torch.optim.SGD(adapter_parameters(mlp), lr=0.05)
    x, target = torch.randn(64, 12), torch.randn(64, 5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(mlp(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    state = mlp.state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base)


def test_double_attach_is_refused_with_nothing_changed(mlp: nn.Module) -> None:
    attach(mlp, LoRAConfig(rank=2))
    before = dict(mlp.named_parameters())
    with pytest.raises(AdapterStateError, match=r"on 2 layers.*'up'.*detach\(\) first"):
        attach(mlp, LoRAConfig(rank=4))
    with pytest.raises(AdapterStateError, match="on its submodule 'inner'"):
        attach(nn.ModuleDict({"inner": mlp}), LoRAConfig(rank=4))
    assert all(p is before[name] for name, p in mlp.named_parameters())


def test_attach_is_all_or_nothing(mlp: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = LoRALinear.start_factors, []

    def failing(layer: LoRALinear, *args: object) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError("no more")
        start(layer, *args)

    monkeypatch.setattr(LoRALinear, "start_factors", failing)
    names = list(mlp.state_dict())
    with pytest.raises(MemoryError):
        attach(mlp, LoRAConfig())
    assert type(mlp.up) is type(mlp.block["down"]) is nn.Linear
    assert list(mlp.state_dict()) == names
    assert all(p.requires_grad for p in mlp.parameters())
    with pytest.raises(AdapterStateError):
        detach(mlp)


def test_nothing_is_changed_where_no_target_matches(mlp: nn.Module) -> None:
    with pytest.raises(TargetError, match="'dwn' may be 'down'"):
        attach(mlp, LoRAConfig(target_modules=["dwn"]))
    assert all(p.requires_grad for p in mlp.parameters())
    assert not lora_layers(mlp)


def test_targets_passed_over_are_warned_of(mlp: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"\['q_proj'\] match no module") as caught:
        attach(mlp, LoRAConfig(target_modules=["up", "q_proj"]))
    assert caught[0].filename == __file__
    assert list(lora_layers(mlp)) == ["up"]


def test_what_all_linear_skipped_is_on_record(llama: nn.Module) -> None:
    attach(llama, LoRAConfig())
    assert attachment(llama).skipped == {"lm_head": "it is the output embedding"}


def test_a_config_must_be_one(mlp: nn.Module) -> None:
    with pytest.raises(ConfigError, match="config must be a LoRAConfig, got a dict"):
        attach(mlp, {"rank": 8})  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [detach, adapter_config, attachment])
def test_without_adapters_it_says_what_to_call(
    mlp: nn.Module, call: Callable[[nn.Module], object]
) -> None:
    with pytest.raises(AdapterStateError, match=r"no adapters are attached.*attach\(\)"):
        call(mlp)
    attach(mlp, LoRAConfig())
    with pytest.raises(AdapterStateError, match="on its submodule 'inner': pass that"):
        call(nn.ModuleDict({"inner": mlp}))
    assert not adapter_parameters(nn.Linear(3, 2))
    assert not is_merged(nn.Linear(3, 2))


def test_parameters_of_a_layer_by_itself_are_named_without_a_path() -> None:
    layer = LoRALinear(4, 3)
    assert [name for name, _ in named_adapter_parameters(layer)] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_everything(llama: nn.Module, token_ids: Tensor, way: str) -> None:
    llama.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    randomized(attach(llama, LoRAConfig(rank=2, target_modules=["q_proj", "lm_head"])))
    merge(llama)
    expected = llama(token_ids).logits
    if way == "deepcopy":
        twin = copy.deepcopy(llama)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(llama))
    else:
        buffer = io.BytesIO()
        torch.save(llama, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(token_ids).logits, expected)
    assert adapter_config(twin) == adapter_config(llama)
    detach(twin)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not llama.model.embed_tokens.weight
    assert {name: p.requires_grad for name, p in twin.named_parameters()} == flags
    assert is_merged(llama)


def test_a_state_dict_resumes_training(mlp: nn.Module, make_mlp: Callable[[], nn.Module]) -> None:
    randomized(attach(mlp, LoRAConfig(rank=2)))
    other = attach(make_mlp(), LoRAConfig(rank=2))
    other.load_state_dict(mlp.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(other(x), mlp(x))


def test_a_compiled_model_counts_as_what_it_wraps(mlp: nn.Module) -> None:
    compiled = torch.compile(mlp, backend="eager")
    x = torch.randn(4, 12)
    before = compiled(x)
    assert attach(compiled, LoRAConfig(rank=2)) is compiled
    assert list(lora_layers(compiled)) == ["up", "block.down"]
    randomized(compiled)
    assert adapter_config(mlp) is adapter_config(compiled)
    assert not torch.allclose(compiled(x), before)
    assert torch.equal(compiled(x), mlp(x))
    detach(compiled)
    assert torch.equal(compiled(x), before)


def test_hooks_of_the_caller_stay(mlp: nn.Module) -> None:
    seen = []
    mlp.up.register_forward_pre_hook(lambda *_: seen.append("pre"))
    mlp.up.register_full_backward_hook(lambda *_: seen.append("backward"))
    attach(mlp, LoRAConfig(rank=2))
    mlp(torch.randn(4, 12, requires_grad=True)).sum().backward()
    assert seen == ["pre", "backward"]


def test_find_targets_changes_nothing(mlp: nn.Module) -> None:
    find_targets(mlp, LoRAConfig())
    assert type(mlp.up) is nn.Linear
    assert all(p.requires_grad for p in mlp.parameters())
