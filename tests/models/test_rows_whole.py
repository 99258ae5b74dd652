"""Samples with whole modules of their own adapters, against each sample by itself, by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whole_cases import by_hand, inputs, randomize, several

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.whole import WholeModule
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models import attach, whole_parameters
from gauge_ext.models.working import adapter_rows, disable_adapters, use_adapters

NAMES = ["b", None, "a", "c", "b", None, "a"]


@pytest.fixture
def model() -> nn.Module:
    return several()


def one_by_one(names: list[str | None], outputs: Callable[[str | None], Tensor]) -> Tensor:
    alone = {name: outputs(name) for name in dict.fromkeys(names)}
    return torch.stack([alone[name][i] for i, name in enumerate(names)])


def expected(model: nn.Module, names: list[str | None] = NAMES) -> Tensor:
    return one_by_one(names, lambda name: by_hand(model, {} if name is None else {name: 1.0}))


@pytest.mark.parametrize("names", [NAMES, ["a"] * 3 + ["b"] * 4, ["c", None, "c"] + [None] * 4])
def test_each_sample_has_its_own(model: nn.Module, names: list[str | None]) -> None:
    usual = model(inputs())
    called = [name or "__base__" for name in names]
    torch.testing.assert_close(model(inputs(), adapter_names=called), expected(model, names))
    with adapter_rows(model, names):
        torch.testing.assert_close(model(inputs()), expected(model, names))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(inputs()), usual)
        with disable_adapters(model):
            plain = model(inputs())
    torch.testing.assert_close(plain, expected(model, [None] * 7))
    torch.testing.assert_close(model(inputs()), usual)


def test_gradients_reach_the_adapter_of_a_sample_alone(model: nn.Module) -> None:
    # Each sample has a loss of its own, so that gradients of another would be seen.
    weights, x = torch.linspace(-1, 2, 7).double()[:, None], inputs().requires_grad_()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with adapter_rows(model, NAMES):
        loss = (model(x).square() * weights).sum()
    found = torch.autograd.grad(loss, [*parameters.values(), x], allow_unused=True)
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for i, name in enumerate(NAMES):
        with use_adapters(model, () if name is None else name):
            total = total + (model(x[i : i + 1]).square() * weights[i]).sum()
    for got, want in zip(
        found, torch.autograd.grad(total, [*parameters.values(), x], allow_unused=True), strict=True
    ):
        torch.testing.assert_close(got, want)
    with adapter_rows(model, ["a", None] * 3 + ["a"]):
        model(inputs()).sum().backward()
    touched = {name for name, p in whole_parameters(model).items() if p.grad is not None}
    assert touched == {"head.weight", "head.bias"}


class Counted(nn.Linear):
    calls: list[int]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x)


def test_one_call_for_each_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Counted(6, 3))
    model[1].calls = []
    for name in ("a", "b"):
        attach(model, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]), name)
    x = inputs().float()
    for names, calls in (
        (["a"] * 7, [7]),
        ([None] * 7, [7]),
        (["a", "b"] * 3 + [None], [3, 3, 1]),
    ):
        model[1].calls.clear()
        with adapter_rows(model, names):
            model(x)
        assert model[1].calls == calls


def test_compiled(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for names in (NAMES, ["a"] * 7, [None, "b", *NAMES[2:]]):
        with adapter_rows(model, names):
            torch.testing.assert_close(compiled(inputs()), expected(model, names))
    torch.testing.assert_close(compiled(inputs()), by_hand(model, {"a": 1.0}))


class Block(nn.Module):
    """A module with a parameter of its own beside a layer, and dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(6)), nn.Linear(6, 5)

    def forward(self, x: Tensor, *, p: float = 0.0) -> Tensor:
        found: Tensor = self.inner(F.dropout(x * self.scale, p, self.training))
        return found


def test_a_module_within_another_that_only_some_save() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up, model.block = nn.Linear(6, 6), Block()
    plain = copy.deepcopy(model.double())
    for name, saved in (("a", ["block"]), ("b", ["inner"]), ("c", None)):
        config = LoRAConfig(rank=2, alpha=6, target_modules=["up"], modules_to_save=saved)
        attach(model, config, name)
    randomize(model)
    tensors, rows = model.state_dict(), [NAMES[i] for i in (0, 2, 1, 4, 3, 5, 6)]

    def alone(name: str | None) -> Tensor:
        own = copy.deepcopy(plain)
        within = "" if name == "a" else f"slots.{name}."
        with torch.no_grad():
            if name is not None:
                product = tensors[f"up.{within}lora_B"] @ tensors[f"up.{within}lora_A"]
                own.up.weight += 6 / 2 * product
            if name in ("a", "b"):
                for key in ("weight", "bias"):
                    own.block.inner.get_parameter(key).copy_(tensors[f"block.inner.{within}{key}"])
            if name == "a":
                own.block.scale.copy_(tensors["block.scale"])
        return own(inputs()).detach()

    with adapter_rows(model, rows):
        torch.testing.assert_close(model(inputs()), one_by_one(rows, alone))
    torch.testing.assert_close(model(inputs()), alone("a"))
    with adapter_rows(model, rows):  # its own dropout goes on
        assert not torch.equal(model.block(inputs(), p=0.5), model.block(inputs(), p=0.5))


def test_tied_copies(llama: nn.Module) -> None:
    fields = {"target_modules": ["q_proj"], "ensure_weight_tying": True}
    llama.double()
    for name in ("a", "b"):
        attach(llama, LoRAConfig(rank=2, **fields, modules_to_save=["embed_tokens"]), name)
    randomize(llama)
    ids, names = torch.arange(12).view(4, 3), ["b", None, "a", "b"]

    def alone(name: str | None) -> Tensor:
        with use_adapters(llama, () if name is None else name):
            return llama(ids).logits

    with adapter_rows(llama, names):
        torch.testing.assert_close(llama(ids).logits, one_by_one(names, alone))


class Reader(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.up, self.part, self.path = nn.Linear(6, 6), nn.Module(), path
        self.part.norm, self.part.rnn = nn.BatchNorm1d(6), nn.LSTM(6, 4, batch_first=True)
        self.part.place, self.part.read = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.part.pair = nn.Bilinear(6, 6, 2)

    def forward(self, x: Tensor) -> Any:
        x, part = self.up(x), self.part
        return {
            "norm": lambda: part.norm(x),
            "rnn": lambda: part.rnn(x[:, None]),
            "place": lambda: x + part.place(torch.arange(6)).mean(0),
            "read": lambda: F.linear(x, part.read.weight),
            "pair": lambda: part.pair(x, x),
        }[self.path]()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("norm", AdapterStateError, "at 'part.norm': its batch normalization"),
        ("rnn", AdapterStateError, "at 'part.rnn': .*returns a tuple, not one tensor"),
        ("place", ConfigError, "for 7 samples, and 'part.place' got .*shape .6,."),
        ("read", AdapterStateError, "'weight' of 'part.read' was read by its name"),
        ("pair", AdapterStateError, "at 'part.pair': .*has 2 tensors as arguments"),
    ],
)
def test_what_cannot_tell_samples_apart(path: str, error: type[Exception], message: str) -> None:
    model = Reader(path)
    for name in ("a", "b"):
        attach(model, LoRAConfig(rank=2, target_modules=["up"], modules_to_save=["part"]), name)
    x, names = inputs().float(), ["a", "b"] * 3 + [None]
    with adapter_rows(model, names), pytest.raises(error, match=message):
        model(x)
    with adapter_rows(model, ["b"] * 7):  # all want one copy
        found = model(x)
    if path == "norm":
        randomize(model)
        with adapter_rows(model.eval(), names):
            found = model(x)
        for i, name in enumerate(names):
            with use_adapters(model, name or ()):
                torch.testing.assert_close(found[i], model(x)[i])
    assert all(
        module.apart is None for module in model.modules() if isinstance(module, WholeModule)
    )


def test_the_output_must_have_the_samples_first() -> None:
    class Sum(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum(0)

    model = nn.Sequential(nn.Linear(6, 6), Sum(6, 3))
    for name in ("a", "b"):
        attach(model, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]), name)
    with (
        adapter_rows(model, ["a", "b"]),
        pytest.raises(AdapterStateError, match=r"at '1': of 1 samples this WholeSum makes \(3,\)"),
    ):
        model(inputs()[:2].float())
