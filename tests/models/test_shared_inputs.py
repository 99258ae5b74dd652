"""Grouped layers compute what they computed before; in every other state they are ungrouped."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.adapters.shared_input import SharedInput
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models import group_shared_inputs, lora_layers, shared_input_groups, ungroup
from gauge_ext.models.many import add_adapter

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, num_attention_heads=2)
    return transformers.BertModel(config, add_pooling_layer=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaModel(config)


MODELS = {
    "bert": (bert, ["encoder.layer.{}.attention.self.", ("query", "key", "value")]),
    "llama": (llama, ["layers.{}.self_attn.", ("q_proj", "k_proj", "v_proj")]),
}


def adapted(name: str = "llama", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    model = gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=2, dropout=dropout))
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def grouped_sizes(model: nn.Module) -> list[int]:
    return sorted(map(len, group_shared_inputs(model, {"input_ids": TOKENS})))


def step(model: nn.Module) -> tuple[Tensor, Mapping[str, Tensor]]:
    torch.manual_seed(7)
    model.zero_grad()
    y = model(input_ids=TOKENS).last_hidden_state
    y.square().sum().backward()
    named = gauge_ext.named_adapter_parameters(model)
    return y.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def calls(model: nn.Module, run: Any) -> int:
    """Count the ops that compute a group."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model)
    names = [event.name for event in profile.events()]
    return names.count("gauge_ext::lora_linear_group")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_equal(name: str, dropout: float) -> None:
    model = adapted(name, dropout)
    expected = step(model)
    groups = group_shared_inputs(model, {"input_ids": TOKENS})
    prefix, members = MODELS[name][1]
    attention = [tuple(f"{prefix.format(i)}{m}" for m in members) for i in range(2)]
    assert [group for group in groups if len(group) == 3] == attention
    assert len(groups) == (4 if name == "llama" else 2)  # gate and up
    assert calls(model, step) == len(groups)
    torch.testing.assert_close(step(model), expected, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=TOKENS)[0], _ungrouped(model))


def _ungrouped(model: nn.Module) -> Tensor:
    ungroup(model)
    assert calls(model, lambda model: model(input_ids=TOKENS)) == 0
    return model(input_ids=TOKENS)[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = adapted("llama", dropout=0.3)
    model.enable_input_require_grads()
    expected = step(model)
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": use_reentrant})
    assert grouped_sizes(model) == [2, 2, 3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert calls(model, step) == 8  # once more in the recomputation
        torch.testing.assert_close(step(model), expected, rtol=1e-11, atol=1e-13)


class Pair(nn.Module):
    """Two layers that read one tensor, one of them under activation checkpointing of its own."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.use_reentrant is None or not self.training:
            return y * self.second(x)
        checkpoint = torch.utils.checkpoint.checkpoint
        return y * checkpoint(self.second, x, use_reentrant=self.use_reentrant)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def pair(use_reentrant: bool | None = None, dropout: float = 0.0) -> Pair:
    config = gauge_ext.LoRAConfig(rank=2, dropout=dropout, target_modules=["first", "second"])
    model = gauge_ext.attach(Pair(use_reentrant), config).train()
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_member_with_checkpointing_of_its_own(use_reentrant: bool) -> None:
    model = pair(use_reentrant)

    def gradients() -> list[Tensor]:
        x = X.clone().requires_grad_()
        return list(torch.autograd.grad(model(x).square().sum(), [x, model.first.lora_A]))

    expected = gradients() if not use_reentrant else None
    assert group_shared_inputs(model, X) == (("first", "second"),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if expected is not None:
            torch.testing.assert_close(gradients(), expected)
            return
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
    plain = pair()
    plain.load_state_dict(model.state_dict())
    y = X.clone().requires_grad_()
    plain(y).square().sum().backward()
    torch.testing.assert_close(
        [x.grad, model.second.lora_A.grad], [y.grad, plain.second.lora_A.grad]
    )


def test_results_are_not_kept_alive() -> None:
    model = pair()
    group_shared_inputs(model, X)
    kept = weakref.ref(x := X.clone().requires_grad_())
    model(x).sum().backward()
    assert isinstance(model.first.shared_input, SharedInput)
    assert model.first.shared_input._results is None
    del x
    assert kept() is None
    held = weakref.ref(model)
    del model
    assert held() is None, "the group must not make a cycle of the layers"
    gc.collect()


def test_unused_results_are_reported_once() -> None:
    model = pair()
    group_shared_inputs(model, X)
    model.first(X)
    with pytest.warns(UserWarning, match=r"the outputs of second were computed .*ungroup"):
        model.first(X + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.first(X + 2)


@pytest.mark.parametrize("change", ["x", "parameter", "mode", "scaling"])
def test_what_changed_in_between_counts(change: str) -> None:
    model, x = pair(), X.clone()
    group_shared_inputs(model, X)
    model.first(x)
    with torch.no_grad():
        if change == "x":
            x.mul_(2)
        elif change == "parameter":
            model.second.lora_A.mul_(2)
        elif change == "scaling":
            model.second.scaling = 5.0
        second = model.second
        expected = x @ (second.weight + second.scaling * second.lora_B @ second.lora_A).T
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = model.second(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected + second.bias)


def test_copies_and_pickles_are_ungrouped_and_whole() -> None:
    model = pair()
    group_shared_inputs(model, X)
    keys, y = list(model.state_dict()), model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in (*copies, torch.load(buffer, weights_only=False)):
        assert other.first.shared_input is None
        assert list(other.state_dict()) == keys
        assert torch.equal(other(X), y)
    assert model.first.shared_input is not None


def test_merge_and_detach() -> None:
    model = pair()
    base = Pair()
    group_shared_inputs(model, X)
    y = model(X)
    gauge_ext.merge(model)
    torch.testing.assert_close(model(X), y)
    gauge_ext.unmerge(model)
    assert torch.equal(model(X), y)
    gauge_ext.detach(model)
    assert "shared_input" not in vars(model.first)
    assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("state", ["merged", "hook", "inference", "several", "traced", "mixed"])
def test_other_states_run_one_by_one(state: str) -> None:
    model = pair()
    group_shared_inputs(model, X)
    assert calls(model, lambda model: model(X)) == 1
    expected = model(X)

    def run(model: nn.Module) -> None:
        if state == "inference":
            with torch.inference_mode():
                y = model(X.clone())
        elif state == "traced":
            y = torch.jit.trace(model, (X,), check_trace=False)(X)
        else:
            y = model(X)
        torch.testing.assert_close(y, expected)

    if state == "merged":
        gauge_ext.merge(model)
    elif state == "hook":
        model.second.register_forward_pre_hook(lambda module, args: None)
    elif state == "several":
        add_adapter(model, gauge_ext.LoRAConfig(rank=2, target_modules=["second"]), "other")
        assert calls(model, run) == 1  # the first adapters work, as before
        gauge_ext.set_adapters(model, ["default", "other"])
    elif state == "mixed":
        model.second.eval()
    assert calls(model, run) == 0


def test_compile_fullgraph() -> None:
    model = pair()
    expected = model(X)
    group_shared_inputs(model, X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)


def test_layers_with_different_inputs_parents_or_dropout_stay_apart() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.twice = (nn.Linear(6, 6) for _ in range(3))
            self.inner = nn.Sequential(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x + 1) + self.inner(x)
            return self.twice(self.twice(x)) + y

    names = ["a", "b", "twice", "inner.0"]
    model = gauge_ext.attach(Apart(), gauge_ext.LoRAConfig(rank=2, target_modules=names))
    model.inner.train(False)
    assert group_shared_inputs(model, (X,)) == ()
    assert model.training
    assert not model.inner.training


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(AdapterStateError, match="no adapters"):
        group_shared_inputs(Pair(), X)
    with pytest.raises(ConfigError, match="sample_inputs must be a tensor, .* or None, got a list"):
        group_shared_inputs(pair(), [X])

    class Idle(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return x

    config = gauge_ext.LoRAConfig(rank=2, target_modules=["first"])
    with pytest.raises(ConfigError, match="calls none"):
        group_shared_inputs(gauge_ext.attach(Idle(), config), X)


@pytest.mark.parametrize("group_inputs", [True, {"input_ids": TOKENS}], ids=["names", "sample"])
def test_attach_groups_too(group_inputs: Any) -> None:
    config = gauge_ext.LoRAConfig(rank=2)
    model = gauge_ext.attach(llama(), config, group_inputs=group_inputs)
    expected = [
        tuple(f"layers.{layer}.{name}" for name in names)
        for layer in range(2)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        )
    ]
    assert list(shared_input_groups(model)) == expected
    ungroup(model)
    assert shared_input_groups(model) == ()
    assert shared_input_groups(gauge_ext.attach(llama(), config)) == ()


def test_attach_that_cannot_group_leaves_no_adapter() -> None:
    model, config = llama(), gauge_ext.LoRAConfig(rank=2)
    with pytest.raises(ConfigError, match="group_inputs must be a tensor, a tuple.*got a str"):
        gauge_ext.attach(model, config, group_inputs="q_proj")
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        gauge_ext.attach(model, config, group_inputs={"no_such_argument": TOKENS})
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    gauge_ext.attach(model, config)
    with pytest.raises(ConfigError, match="group_inputs is for the first adapter"):
        gauge_ext.attach(model, config, "second", group_inputs=True)
