"""Several adapters on one model, each output held against weights merged by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from many_cases import CONFIGS, bare, by_hand, randomize, rows, several
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models import adapter_parameters, attach, detach, merge, merged_copy, unmerge
from gauge_ext.models.many import add_adapter, delete_adapter, rename_adapter
from gauge_ext.models.roster import adapter_names, adapter_slots
from gauge_ext.models.working import (
    active_adapters,
    adapter_rows,
    disable_adapters,
    set_adapters,
    use_adapters,
)


@pytest.fixture
def model() -> nn.Sequential:
    return several()


@pytest.mark.parametrize(
    "weights",
    [{"default": 1.0}, {"b": 1.0}, {"c": -0.5}, {"default": 0.3, "b": 2.0, "c": 1.0}, {}],
)
def test_active_adapters_by_hand(model: nn.Sequential, weights: dict[str, float]) -> None:
    assert adapter_names(model) == ("default", "b", "c")
    assert active_adapters(model) == {"default": 1.0}
    set_adapters(model, weights)
    assert active_adapters(model) == weights
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), weights))
    merge(model)
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), weights))
    unmerge(model)
    torch.testing.assert_close(merged_copy(model)(rows()), by_hand(model, rows(), weights))


def test_contexts_nest_and_restore(model: nn.Sequential) -> None:
    expected = {name: by_hand(model, rows(), {name: 1.0}) for name in CONFIGS}
    with use_adapters(model, "b"):
        torch.testing.assert_close(model(rows()), expected["b"])
        with disable_adapters(model):
            torch.testing.assert_close(model(rows()), bare()(rows()))
        with pytest.raises(ZeroDivisionError), disable_adapters(model):
            raise ZeroDivisionError
        torch.testing.assert_close(model(rows()), expected["b"])
    torch.testing.assert_close(model(rows()), expected["default"])


def test_the_base_alone_of_a_model_with_one_adapter() -> None:
    model = bare()
    attach(model, CONFIGS["default"])
    randomize(model)
    before = model(rows())
    with disable_adapters(model):
        torch.testing.assert_close(model(rows()), bare()(rows()))
    torch.testing.assert_close(model(rows()), before)
    assert set(model.state_dict()) == {
        *bare().state_dict(),
        *(f"{path}.{factor}" for path in "02" for factor in ("lora_A", "lora_B")),
    }


@pytest.mark.parametrize(
    "names",
    [["b", None, "c", "default", "b", "c", None], ["c"] * 7, [None] * 7, ["b", "default"] * 3],
)
def test_an_adapter_for_each_row(model: nn.Sequential, names: Sequence[str | None]) -> None:
    x = rows(len(names))
    with adapter_rows(model, names):
        y = model(x)
        if y.requires_grad:
            y.square().sum().backward()
    each = [
        by_hand(model, x[i : i + 1], {} if name is None else {name: 1.0})
        for i, name in enumerate(names)
    ]
    torch.testing.assert_close(y, torch.cat(each))
    gradients = [None if p.grad is None else p.grad.clone() for p in adapter_parameters(model)]
    for parameter in adapter_parameters(model):
        parameter.grad = None
    # The same sum, one adapter after the other.
    for name in dict.fromkeys(names):
        own = torch.tensor([other == name for other in names])
        with use_adapters(model, () if name is None else name):
            part = model(x[own]).square().sum()
        if part.requires_grad:
            part.backward()
    for parameter, gradient in zip(adapter_parameters(model), gradients, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model(rows()), by_hand(model, rows(), {"default": 1.0}))


def test_rows_of_samples_with_many_tokens(model: nn.Sequential) -> None:
    x = rows(12).view(3, 4, 6)
    with adapter_rows(model, ["c", None, "b"]):
        y = model(x)
    for i, weights in enumerate([{"c": 1.0}, {}, {"b": 1.0}]):
        torch.testing.assert_close(y[i], by_hand(model, x[i], weights))


def test_gradients_reach_the_active_adapters_alone(model: nn.Sequential) -> None:
    set_adapters(model, {"b": 1.0, "c": 0.5})
    model(rows()).sum().backward()
    for name in CONFIGS:
        factors = [
            p
            for holder in adapter_slots(model, name).values()
            for p in (holder.get_parameter("lora_A"), holder.get_parameter("lora_B"))
        ]
        assert all((p.grad is not None) == (name != "default") for p in factors)


def test_delete_and_rename(model: nn.Sequential) -> None:
    expected = {name: by_hand(model, rows(), {name: 1.0}) for name in CONFIGS}
    kept = dict(adapter_slots(model, "c"))
    rename_adapter(model, "c", "d")
    assert adapter_names(model) == ("default", "b", "d")
    assert {k: v.get_parameter("lora_A") for k, v in adapter_slots(model, "d").items()} == {
        k: v.get_parameter("lora_A") for k, v in kept.items()
    }
    delete_adapter(model, "default")
    assert active_adapters(model) == {}
    torch.testing.assert_close(model(rows()), bare()(rows()))
    for name, old in (("b", "b"), ("d", "c")):
        with use_adapters(model, name):
            torch.testing.assert_close(model(rows()), expected[old])
    delete_adapter(model, "b")
    assert type(model[2]) is nn.Linear
    assert [type(model[i]).__name__ for i in (0, 4)] == ["LoRALinear"] * 2
    with pytest.raises(AdapterStateError, match="'d' is the only adapter"):
        delete_adapter(model, "d")


def test_detach_leaves_the_bare_model(model: nn.Sequential) -> None:
    bits = bare().state_dict()
    detach(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in bare()]
    assert set(model.state_dict()) == set(bits)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    attach(model, CONFIGS["b"])
    assert adapter_names(model) == ("default",)


def test_copies_and_pickles(model: nn.Sequential) -> None:
    set_adapters(model, {"b": 0.5, "c": 1.0})
    expected = model(rows())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert adapter_names(twin) == ("default", "b", "c")
        torch.testing.assert_close(twin(rows()), expected)
        set_adapters(twin, "default")
        delete_adapter(twin, "c")
    torch.testing.assert_close(model(rows()), expected)
    assert adapter_names(model) == ("default", "b", "c")
    fresh = bare()
    attach(fresh, CONFIGS["default"])
    for name in ("b", "c"):
        add_adapter(fresh, CONFIGS[name], name)
    fresh.load_state_dict(model.state_dict())
    set_adapters(fresh, {"b": 0.5, "c": 1.0})
    torch.testing.assert_close(fresh(rows()), expected)


def test_dropout_of_several_in_training() -> None:
    model = bare()
    attach(model, LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]))
    add_adapter(model, LoRAConfig(rank=2, dropout=0.25, target_modules=["0"]), "b")
    randomize(model)
    model.train()
    torch.manual_seed(0)
    first = model(rows())
    torch.manual_seed(0)
    assert torch.equal(model(rows()), first)
    assert not torch.equal(model(rows()), first)
    with (
        pytest.raises(AdapterStateError, match="no dropout in training"),
        adapter_rows(model, ["b"] * 7),
    ):
        model(rows())


def test_what_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(AdapterStateError, match=r"no adapter 'z'.*'default', 'b', 'c'"):
        set_adapters(model, "z")
    with pytest.raises(AdapterStateError, match="an adapter 'b' already"):
        add_adapter(model, CONFIGS["b"], "b")
    for name in ("", "a.b", "a/b", "keys"):
        with pytest.raises(ConfigError, match="an adapter"):
            add_adapter(model, CONFIGS["b"], name)
    with pytest.raises(ConfigError, match="weight of 'b' must be a finite number, got nan"):
        set_adapters(model, {"b": float("nan")})
    with pytest.raises(TargetError, match="matches no module"):
        add_adapter(model, LoRAConfig(target_modules=["nowhere"]), "z")
    assert adapter_names(model) == ("default", "b", "c")
    merge(model)
    for call in (
        lambda: set_adapters(model, "b"),
        lambda: add_adapter(model, CONFIGS["b"], "z"),
        lambda: delete_adapter(model, "b"),
    ):
        with pytest.raises(AdapterStateError, match="merged"):
            call()


def test_the_first_adapter_under_a_name_of_its_own() -> None:
    model = add_adapter(bare(), CONFIGS["c"], "mine")
    assert adapter_names(model) == ("mine",)
    assert active_adapters(model) == {"mine": 1.0}


@pytest.mark.parametrize(
    "changes",
    [{"bias": "all"}, {"bias": "lora_only"}],
)
def test_biases_are_the_first_adapters(changes: dict[str, object]) -> None:
    model = attach(bare(), CONFIGS["default"])
    expected = model(rows())
    special = LoRAConfig(rank=2, target_modules=["0", "2"], **changes)
    with pytest.raises(ConfigError, match="is for the first adapter on a model"):
        add_adapter(model, special, "b")
    assert adapter_names(model) == ("default",)
    assert torch.equal(model(rows()), expected)
