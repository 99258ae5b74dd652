"""``model(x, adapter_names=[...])`` against each row by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import adapter_parameters, detach
from gauge_ext.models.many import add_adapter
from gauge_ext.models.working import disable_adapters, use_adapters


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, *, fails: bool = False) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        if fails:
            raise ZeroDivisionError
        return y


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    found = Model().double()
    add_adapter(found, LoRAConfig(rank=2, target_modules=["up"]), "first")
    add_adapter(found, LoRAConfig(rank=3, target_modules=["up", "down"]), "second")
    with torch.no_grad():
        for parameter in adapter_parameters(found):
            parameter.normal_(std=0.5)
    return found


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NAMES = ["second", "__base__", "first", None]


def one_by_one(model: Model) -> Tensor:
    rows = []
    for x, name in zip(X, NAMES, strict=True):
        with use_adapters(model, () if name in (None, "__base__") else name):
            rows.append(model(x))
    return torch.stack(rows)


def test_each_row_has_its_own(model: Model) -> None:
    expected, usual = one_by_one(model), model(X)
    torch.testing.assert_close(model(X, adapter_names=NAMES), expected)
    torch.testing.assert_close(model(X), usual)
    torch.testing.assert_close(model(X, adapter_names=None), usual)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X, adapter_names=NAMES), expected)
        torch.testing.assert_close(twin(X), usual)


def test_it_holds_for_one_call_also_where_that_fails(model: Model) -> None:
    usual = model(X)
    with pytest.raises(ZeroDivisionError):
        model(X, fails=True, adapter_names=NAMES)
    torch.testing.assert_close(model(X), usual)
    with pytest.raises(AdapterStateError, match="no adapter 'c'"):
        model(X, adapter_names=["c"] * 4)
    torch.testing.assert_close(model(X), usual)


def test_without_adapters_the_argument_is_gone(model: Model) -> None:
    twin = copy.deepcopy(model)
    for found in (model, twin):
        detach(found)
        with pytest.raises(TypeError, match="adapter_names"):
            found(X, adapter_names=NAMES)
        assert not found._forward_hooks
        assert not found._forward_pre_hooks


def test_the_list_of_peft(model: Model) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        Model().double(), peft.LoraConfig(r=2, lora_alpha=16, target_modules=["up"]), "first"
    )
    theirs.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=16, target_modules=["up", "down"]))
    with torch.no_grad():
        for path in ("up", "down"):
            layer, own = theirs.base_model.model.get_submodule(path), getattr(model, path)
            for name in layer.lora_A:
                layer.lora_A[name].weight.copy_(own.adapter(name).lora_A)
                layer.lora_B[name].weight.copy_(own.adapter(name).lora_B)
    names = ["second", "__base__", "first", "second"]
    torch.testing.assert_close(
        model.eval()(X, adapter_names=names), theirs.eval()(X, adapter_names=names)
    )


# Dynamo itself looks at the .grad of an output, where the hook after the forward breaks the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_it_is_the_same(model: Model) -> None:
    expected, usual = one_by_one(model), model(X)
    with disable_adapters(model):
        plain = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(X), usual)
    torch.testing.assert_close(compiled(X, adapter_names=NAMES), expected)
    with disable_adapters(model):
        torch.testing.assert_close(compiled(X), plain)
    torch.testing.assert_close(compiled(X), usual)
