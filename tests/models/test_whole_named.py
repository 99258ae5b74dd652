"""modules_to_save of several adapters on one model: each has copies of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from whole_cases import SAVED, Base, by_hand, config, inputs, randomize, several

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models import (
    attach,
    detach,
    merged_copy,
    whole_parameters,
)
from gauge_ext.models.many import delete_adapter
from gauge_ext.models.working import (
    active_adapters,
    disable_adapters,
    set_adapters,
    use_adapters,
)


@pytest.fixture
def model() -> nn.Module:
    return several()


@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"b": -0.5}, {"a": 2.0, "c": 0.5}, {"c": 3.0, "b": 1.0}],
    ids=str,
)
def test_by_hand(model: nn.Module, weights: dict[str, float]) -> None:
    base = Base()(inputs())
    for before in ("b", "a"):
        set_adapters(model, before)
        set_adapters(model, weights)
        torch.testing.assert_close(model(inputs()), by_hand(model, weights))
    with use_adapters(model, "a"), disable_adapters(model):
        torch.testing.assert_close(model(inputs()), base)
    torch.testing.assert_close(model(inputs()), by_hand(model, weights))
    set_adapters(model, [])
    torch.testing.assert_close(model(inputs()), base)


def test_two_at_once_are_refused(model: nn.Module) -> None:
    before = model(inputs())
    for together in (["a", "b"], {"c": 1.0, "b": 0.5, "a": 0.5}):
        with pytest.raises(AdapterStateError, match=r"'head' can be that of one adapter.*'a'"):
            set_adapters(model, together)
        assert active_adapters(model) == {"a": 1.0}
        assert torch.equal(model(inputs()), before)


def test_training_reaches_the_one_that_works(model: nn.Module) -> None:
    set_adapters(model, "b")
    untouched = {n: p for n, p in whole_parameters(model).items() if "slots" not in n}
    model(inputs()).square().sum().backward()
    moved = {name for name, p in whole_parameters(model).items() if p.grad is not None}
    assert moved == {"mid.weight", "head.slots.b.weight", "head.slots.b.bias"}
    assert set(untouched) == {"mid.weight", "head.weight", "head.bias"}
    assert not any(p.requires_grad for m in (model.mid, model.head) for p in m._own.values())


def test_compiled_once_for_each(model: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for frames in ([1, 2, 3], [3, 3, 3]):
        for name, count in zip(SAVED, frames, strict=True):
            set_adapters(model, name)
            torch.testing.assert_close(compiled(inputs()), by_hand(model, {name: 1.0}))
            assert counter.frame_count == count
    set_adapters(compiled, "b")
    torch.testing.assert_close(torch.compile(model)(inputs()), by_hand(model, {"b": 1.0}))


def test_tied_weights_stay_tied(llama: nn.Module) -> None:
    table, ids = llama.model.embed_tokens.weight, torch.tensor([[1, 2, 3]])
    base = llama(ids).logits
    fields = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    for name, saved in (("a", ["lm_head"]), ("b", ["embed_tokens"])):
        attach(llama, LoRAConfig(rank=2, **fields, modules_to_save=saved), name)
    randomize(llama)
    seen = []
    for name in ("a", "b"):
        set_adapters(llama, name)
        assert llama.lm_head.weight is llama.model.embed_tokens.weight
        seen.append(llama.lm_head.weight)
        plain = merged_copy(llama)
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        torch.testing.assert_close(plain(ids).logits, llama(ids).logits)
    assert len({id(p) for p in (*seen, table)}) == 3
    with disable_adapters(llama):
        assert torch.equal(llama(ids).logits, base)
    detach(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight is table


def test_copies_of_a_part_take_the_place_of_copies_of_all() -> None:
    model = nn.Sequential()
    model.emb, model.up, model.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    model.head.weight = table = model.emb.weight
    bias, fields = model.head.bias, {"target_modules": ["up"], "ensure_weight_tying": True}
    attach(model, LoRAConfig(rank=2, **fields, modules_to_save=["head"]), "a")
    attach(model, LoRAConfig(rank=2, **fields, modules_to_save=["emb"]), "b")
    randomize(model)
    assert set(whole_parameters(model, "a")) == {"emb.weight", "head.weight", "head.bias"}
    set_adapters(model, "b")
    assert model.head.bias is bias
    delete_adapter(model, "a")
    assert set(whole_parameters(model)) == {"emb.weight", "head.weight"}
    assert dict(model.named_parameters(remove_duplicate=False))["head.bias"] is bias
    assert model.head.weight is model.emb.weight is not table


def test_a_module_that_keeps_what_it_has_read() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.rnn = nn.Linear(6, 6), nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.rnn(self.up(x))[0]
            return found

    model = Model().double()
    x, base = inputs()[None], copy.deepcopy(model)
    for name in ("a", "b"):
        attach(model, LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["rnn"]), name)
    randomize(model)
    for name in ("a", "b"):
        set_adapters(model, name)
        torch.testing.assert_close(model(x), merged_copy(model)(x))
        for key, own in base.rnn.named_parameters():
            within = "" if name == "a" else "slots.b."
            own.data.copy_(model.rnn.get_parameter(within + key))
        base.up.weight.data.copy_(merged_copy(model).up.weight)
        torch.testing.assert_close(model(x), base(x))


def test_what_goes_with_it_no_further(model: nn.Module) -> None:
    before = model(inputs())
    for fields, error, message in (
        (
            {"target_modules": ["pre"], "modules_to_save": ["up"]},
            TargetError,
            "'up' is adapted in place by 'a', 'b', 'c'",
        ),
        ({"target_modules": ["mid"]}, TargetError, "'b' has it trained whole"),
        ({"target_parameters": ["mid.weight"]}, TargetError, "'b' has its module trained whole"),
        ({"modules_to_save": ["no"]}, TargetError, "modules_to_save names 'no'"),
        ({"bias": "all"}, ConfigError, "bias='all'"),
    ):
        named = {"rank": 2, "target_modules": ["up"]} | fields
        with pytest.raises(error, match=message):
            attach(model, LoRAConfig(**named), "d")
        assert torch.equal(model(inputs()), before)
    other = attach(Base(), config("c", bias="all"), "c")
    with pytest.raises(TargetError, match="means 'head.bias', in whose place the adapter 'c'"):
        attach(other, config("a"), "a")
    assert type(other.head) is nn.Linear
