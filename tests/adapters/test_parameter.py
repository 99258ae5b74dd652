"""Adapters on bare parameters, against W_e + s B_e A_e summed by loops."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext import LoRAConfig, attach, detach, load_adapter, merge, save_adapter
from gauge_ext.adapters import AdapterSpec
from gauge_ext.adapters.parameter import LoRAHolder, LoRAParameter, adapt_parameter
from gauge_ext.errors import (
    AdapterMismatchError,
    ConfigError,
    GeometryError,
    NonFiniteError,
    TargetError,
)
from gauge_ext.models import lora_layers, merged_copy, unmerge
from gauge_ext.models.regauge import regauge_model


class Experts(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 7) if transposed else torch.randn(3, 7, 4))
        self.down = nn.Parameter(torch.randn(3, 7, 5) if transposed else torch.randn(3, 5, 7))
        self.out = nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 5)
        for up, down in zip(self.up, self.down, strict=True):
            up, down = (up, down) if self.is_transposed else (up.T, down.T)
            total = total + torch.tanh(x @ up) @ down
        return total @ self.out.T


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.lin(x))


NAMES = ["experts.up", "down", "out"]
CONFIG = LoRAConfig(rank=2, alpha=3, target_modules=[], target_parameters=NAMES)


def adapted(
    transposed: bool = False, dtype: torch.dtype = torch.float64, config: LoRAConfig = CONFIG
) -> tuple[Model, Model]:
    torch.manual_seed(0)
    base = Model(transposed).to(dtype)
    model = attach(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in gauge_ext.adapter_parameters(model):
            parameter.normal_(std=0.5)
    return base, model


def by_hand(base: Model, model: Model) -> Model:
    twin = copy.deepcopy(base).double()
    with torch.no_grad():
        for name in ("up", "down", "out"):
            weight = getattr(twin.experts, name)
            adapter = getattr(model.experts, f"lora_{name}")
            a, b = adapter.lora_A.double(), adapter.lora_B.double()
            stack = weight if weight.dim() == 3 else weight[None]
            for e in range(len(stack)):
                for k in range(2):
                    delta = torch.outer(b[:, k * len(stack) + e], a[e * 2 + k])
                    stack[e] += 1.5 * (
                        delta.T if base.experts.is_transposed and weight.dim() == 3 else delta
                    )
    return twin


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_output_merge_and_the_way_back(x: Tensor, transposed: bool) -> None:
    base, model = adapted(transposed)
    before = copy.deepcopy(base.state_dict())
    expected = by_hand(base, model)(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(merged_copy(model)(x), expected)
    merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.experts.up, by_hand(base, model).experts.up)
    unmerge(model)
    torch.testing.assert_close(model(x), expected)
    detach(model)
    assert type(model.experts) is Experts
    assert not list(model.experts.children())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_of_the_factors_alone(x: Tensor) -> None:
    base, model = adapted()
    kept = [p.detach().clone() for p in base.parameters()]
    factors = dict(gauge_ext.named_adapter_parameters(model))
    model(x).square().sum().backward()
    for name, factor in factors.items():
        place, step = factor.detach().abs().argmax(), 1e-6
        with torch.no_grad():
            found = []
            for sign in (1, -1):
                factor.view(-1)[place] += sign * step
                found.append(by_hand(base, model)(x).square().sum())
                factor.view(-1)[place] -= sign * step
        slope = (found[0] - found[1]) / (2 * step)
        torch.testing.assert_close(factor.grad.view(-1)[place], slope, rtol=1e-5, atol=1e-6)
        assert name.startswith("experts.lora_")
    named = dict(model.named_parameters())
    for (name, _), before in zip(base.named_parameters(), kept, strict=True):
        assert named[name].grad is None
        assert torch.equal(named[name], before)


def test_a_fresh_adapter_changes_nothing_and_starts_as_a_linear_layer_does(x: Tensor) -> None:
    torch.manual_seed(0)
    base = Model().double()
    plain = base(x)
    model = attach(copy.deepcopy(base), CONFIG)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    a = model.experts.lora_up.lora_A
    assert a.shape == (6, 4)
    assert 0 < a.abs().max() <= 0.5  # 1 / sqrt(in)
    assert lora_layers(model)["experts.lora_up"].rank == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(x: Tensor, dtype: torch.dtype) -> None:
    base, model = adapted(dtype=dtype)
    expected = by_hand(base, model)
    for name, adapter in model.experts.parameter_adapters().items():
        weight = getattr(expected.experts, name)
        eps = torch.finfo(dtype).eps
        assert adapter.lora_A.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            total = adapter()
        assert total.dtype == dtype
        scale = weight.abs().max() + adapter.delta_weight().abs().max()
        assert (total - weight).abs().max() <= 4 * eps * scale
        assert (adapter.merged_weight() - weight).abs().max() <= 2 * eps * weight.abs().max()


def test_pickle_copy_and_state_dict(x: Tensor) -> None:
    _, model = adapted()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.experts, LoRAHolder)
        assert twin.experts.lora_up.owner is twin.experts
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    _, other = adapted()
    for parameter in gauge_ext.adapter_parameters(other):
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    # The kept base moves along with a merged model.
    twin = unmerge(merge(model).float())
    assert twin.experts.up.dtype == torch.float32


def test_compiled_without_a_break(x: Tensor) -> None:
    _, model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_saved_and_loaded(x: Tensor, tmp_path: Path) -> None:
    base, model = adapted()
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    with torch.no_grad():
        again.experts.lora_up.lora_B.zero_()
    torch.testing.assert_close(load_adapter(again, tmp_path)(x), model(x), rtol=0, atol=0)
    wider = Model().double()
    wider.experts.up = nn.Parameter(torch.randn(4, 7, 4, dtype=torch.float64))
    with pytest.raises(AdapterMismatchError, match=r"lora_A \(6, 4\).*needs lora_A \(8, 4\)"):
        load_adapter(wider, tmp_path)
    assert type(wider.experts) is Experts
    less = Model().double()
    del less.experts.out
    less.experts.register_buffer("out", torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(TargetError, match="names 'out'"):
        load_adapter(less, tmp_path)
    with pytest.raises(ConfigError, match="neither with portable"):
        save_adapter(model, tmp_path / "portable", portable=True)


def test_a_module_that_holds_one_cannot_be_adapted_itself() -> None:
    config = LoRAConfig(target_modules=["lin"], target_parameters=["lin.weight"])
    with pytest.raises(TargetError, match="'lin.weight'.*the module that holds it"):
        attach(Model(), config)
    model = attach(Model(), LoRAConfig(target_modules=[], target_parameters=["lin.weight"]))
    assert isinstance(model.lin, nn.Linear)
    assert isinstance(model.lin.lora_weight, LoRAParameter)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_parameters": "up"}, ConfigError, "target_parameters must be a list"),
        ({"target_parameters": ["no"]}, TargetError, "'no'.*holds a parameter"),
        ({"target_parameters": ["up"], "dropout": 0.1}, TargetError, "dropout .* on inputs"),
        ({"target_parameters": ["up"], "use_dora": True}, TargetError, "without use_dora"),
        ({"target_parameters": ["up"], "lora_bias": True}, TargetError, "without lora_bias"),
        ({"target_parameters": ["up"], "init": "pissa"}, TargetError, "init 'pissa'"),
        ({"target_parameters": ["lin.bias"]}, TargetError, r"shape \(out, in\)"),
    ],
)
def test_refused(fields: dict[str, object], error: type[Exception], message: str) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        attach(model, LoRAConfig(**{"target_modules": []} | fields))
    assert type(model.experts) is Experts
    assert all(p.requires_grad for p in model.parameters())


def test_refused_on_the_object() -> None:
    holder = Experts()
    holder.up = nn.Parameter(torch.zeros(3, 7, 4, dtype=torch.complex64))
    with pytest.raises(TargetError, match="complex64"):
        adapt_parameter(holder, "up", AdapterSpec())
    holder.forward = lambda x: x
    with pytest.raises(TargetError, match="forward of its module was replaced"):
        adapt_parameter(holder, "down", AdapterSpec())


def test_not_finite_and_no_gauge() -> None:
    _, model = adapted()
    with pytest.raises(GeometryError, match="no point of one bundle"):
        regauge_model(model, "svd")
    model.experts.lora_down.lora_A.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="experts.lora_down: lora_A"):
        merge(model)
    assert not model.experts.lora_up.merged
