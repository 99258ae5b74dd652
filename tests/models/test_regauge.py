"""A model's adapters in another gauge: the same model, and training that goes on the same way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError, ConfigError, NonFiniteError
from gauge_ext.geometry import GAUGES, GaugeName
from gauge_ext.models import (
    adapter_parameters,
    attach,
    lora_layers,
    merge,
    regauge_model,
    regauge_optimizer_state,
    unmerge,
)

F64 = torch.float64
RANK = 3
Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture
def adapted(mlp: nn.Module) -> nn.Module:
    """An MLP in float64 with random adapters of rank 3 and scaling 2, in no special gauge."""
    return randomized(attach(mlp.double(), LoRAConfig(rank=RANK, alpha=2 * RANK)))


def randomized(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for factor in (layer.lora_B, layer.lora_A):
                factor.copy_(torch.randn(factor.shape, generator=g))
    return model


def factors(model: nn.Module) -> Factors:
    """Copies of lora_B and lora_A by layer."""
    return {
        name: (layer.lora_B.detach().clone(), layer.lora_A.detach().clone())
        for name, layer in lora_layers(model).items()
    }


def batches(model: nn.Module, count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(7, 12, generator=g, dtype=F64), torch.randn(7, 5, generator=g, dtype=F64))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def updates(model: nn.Module) -> Tensor:
    """All products of the factors, by hand, as one vector."""
    return torch.cat([(b @ a).flatten() for b, a in factors(model).values()])


def off(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("gauge", GAUGES)
def test_every_gauge_leaves_the_model_as_it_is(adapted: nn.Module, gauge: GaugeName) -> None:
    x = batches(adapted, 1)[0][0]
    before, old, parameters = adapted(x), factors(adapted), adapter_parameters(adapted)
    gauges = regauge_model(adapted, gauge)
    assert off(adapted(x), before) < 1e-13
    assert all(p is q for p, q in zip(adapter_parameters(adapted), parameters, strict=True))
    assert set(gauges) == {"up", "block.down"}
    for name, (b, a) in factors(adapted).items():
        old_b, old_a = old[name]
        assert lora_layers(adapted)[name].scaling == 2.0
        assert off(a, old_a) > 0.01
        assert off(b @ a, old_b @ old_a) < 1e-13
        assert off(gauges[name] @ old_a, a) < 1e-13
        assert off(b @ gauges[name], old_b) < 1e-13


def test_the_gauge_is_that_of_the_effective_factor(adapted: nn.Module) -> None:
    regauge_model(adapted, "balanced")
    for b, a in factors(adapted).values():
        assert off(4.0 * b.mT @ b, a @ a.mT) < 1e-12


def test_half_precision_and_merged_models(make_mlp: Callable[..., nn.Module]) -> None:
    config = LoRAConfig(rank=RANK, adapter_dtype=torch.bfloat16)
    model = randomized(attach(make_mlp(), config))
    before = updates(model).double()
    merge(model)
    regauge_model(model, "equal_energy")
    unmerge(model)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.bfloat16}
    assert (
        off(
            torch.cat([(b.double() @ a.double()).flatten() for b, a in factors(model).values()]),
            before,
        )
        < 0.01
    )


def test_layers_that_no_invertible_gauge_reaches_stay_trainable(adapted: nn.Module) -> None:
    layers = lora_layers(adapted)
    with torch.no_grad():
        layers["up"].lora_B.zero_()  # as before training
        layers["block.down"].lora_A[2] = layers["block.down"].lora_A[0]
    old = factors(adapted)
    assert regauge_model(adapted, "svd") == {}
    for name, (b, a) in factors(adapted).items():
        assert torch.equal(b, old[name][0])
        assert torch.equal(a, old[name][1])


def test_all_layers_change_or_none(adapted: nn.Module) -> None:
    with torch.no_grad():
        lora_layers(adapted)["block.down"].lora_A[0, 0] = math.nan
    old = factors(adapted)
    with pytest.raises(NonFiniteError, match=r"block\.down: the factors hold NaN"):
        regauge_model(adapted, "svd")
    assert torch.equal(factors(adapted)["up"][1], old["up"][1])


def test_what_has_no_gauge_is_refused(adapted: nn.Module, make_mlp: Any) -> None:
    with pytest.raises(AdapterStateError, match="no adapters are attached"):
        regauge_model(make_mlp(), "svd")
    with pytest.raises(ConfigError, match="gauge must be one of svd, .*, got 'lq'"):
        regauge_model(adapted, "lq")  # type: ignore[arg-type]
    half = attach(make_mlp(), LoRAConfig(rank=1, alpha=1, adapter_dtype=torch.float16))
    with torch.no_grad():
        for parameter in adapter_parameters(half):
            parameter.fill_(500.0)
    with pytest.raises(NonFiniteError, match=r"exceed the range of torch.float16. Choose"):
        regauge_model(half, "pivot")
    regauge_model(half, "balanced")


# States after steps of size 0 are averages over the same gradients in two gauges: an oracle that
# knows nothing of any rule.


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, lr=0.0), "exp_avg"),
    ],
    ids=["SGD", "AdamW"],
)
def test_first_moments_move_exactly_as_if_they_had_been_gathered_there(
    adapted: nn.Module, gauge: GaugeName, make: Any, key: str
) -> None:
    there = copy.deepcopy(adapted)
    gauges = regauge_model(there, gauge)
    data = batches(adapted, 4)
    optimizer, expected = make(adapter_parameters(adapted)), make(adapter_parameters(there))
    train(adapted, optimizer, data)
    train(there, expected, data)
    regauge_optimizer_state(optimizer, adapted, gauges)
    for p, q in zip(adapter_parameters(adapted), adapter_parameters(there), strict=True):
        assert off(optimizer.state[p][key], expected.state[q][key]) < 1e-12
        if key == "exp_avg":
            assert bool((optimizer.state[p]["exp_avg_sq"] >= 0).all())
            assert optimizer.state[p]["step"] == 4


@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_move_exactly_under_permutations_and_scales(
    adapted: nn.Module, amsgrad: bool
) -> None:
    there = copy.deepcopy(adapted)
    # Powers of 2, signs and a permutation: the largest of several squares is the largest still.
    g = torch.tensor([[0, -2, 0], [0.5, 0, 0], [0, 0, 4]], dtype=F64)
    with torch.no_grad():
        for layer in lora_layers(there).values():
            layer.lora_A.copy_(g @ layer.lora_A)
            layer.lora_B.copy_(layer.lora_B @ torch.linalg.inv(g))
    data = batches(adapted, 4)
    optimizer, expected = (
        torch.optim.Adam(adapter_parameters(model), lr=0.0, amsgrad=amsgrad)
        for model in (adapted, there)
    )
    train(adapted, optimizer, data)
    train(there, expected, data)
    regauge_optimizer_state(optimizer, adapted, dict.fromkeys(lora_layers(adapted), g))
    for p, q in zip(adapter_parameters(adapted), adapter_parameters(there), strict=True):
        for key in ("exp_avg_sq", "max_exp_avg_sq")[: 1 + amsgrad]:
            assert off(optimizer.state[p][key], expected.state[q][key]) < 1e-12


def test_adamw_goes_on_as_before_after_a_signed_permutation(adapted: nn.Module) -> None:
    there = copy.deepcopy(adapted)
    one, two = (torch.optim.AdamW(adapter_parameters(m), lr=0.03) for m in (adapted, there))
    data = batches(adapted, 8)
    train(adapted, one, data[:4])
    train(there, two, data[:4])
    g = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 0, -1]], dtype=F64)
    with torch.no_grad():
        for layer in lora_layers(there).values():
            layer.lora_A.copy_(g @ layer.lora_A)
            layer.lora_B.copy_(layer.lora_B @ g.mT)
    regauge_optimizer_state(two, there, dict.fromkeys(lora_layers(there), g))
    train(adapted, one, data[4:])
    train(there, two, data[4:])
    assert off(updates(there), updates(adapted)) < 1e-13


class HeavyBall(torch.optim.Optimizer):
    """Momentum of gradients, preconditioned at each step: dB = m_B (A Aᵀ)⁻¹, dA = (Bᵀ B)⁻¹ m_A.

    That step transforms like the factors themselves (ScaledGD, arXiv:2005.08898), so its course
    does not depend on the gauge if its state moves along.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(adapter_parameters(model), {"lr": lr})
        self.layers = list(lora_layers(model).values())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        lr = self.defaults["lr"]
        for layer in self.layers:
            b, a = layer.lora_B, layer.lora_A
            m_b, m_a = (self._momentum(p) for p in (b, a))
            step_b = torch.linalg.solve(a @ a.mT, m_b, left=False)
            step_a = torch.linalg.solve(b.mT @ b, m_a)
            b -= lr * step_b
            a -= lr * step_a

    def _momentum(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        return buffer.mul_(0.9).add_(p.grad)


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_covariant_optimizer_runs_on_as_if_no_gauge_had_changed(
    adapted: nn.Module, gauge: GaugeName
) -> None:
    there, forgetful = copy.deepcopy(adapted), copy.deepcopy(adapted)
    data = batches(adapted, 10)
    for model, carried in ((adapted, None), (there, True), (forgetful, False)):
        optimizer = HeavyBall(model, lr=0.05)
        train(model, optimizer, data[:5])
        if carried is not None:
            gauges = regauge_model(model, gauge)
            if carried:
                regauge_optimizer_state(optimizer, model, gauges)
        train(model, optimizer, data[5:])
    assert off(updates(there), updates(adapted)) < 1e-10
    assert off(updates(forgetful), updates(adapted)) > 1e-3


def test_other_parameters_and_fresh_optimizers_are_left_alone(adapted: nn.Module) -> None:
    weight = next(iter(adapted.parameters())).requires_grad_()
    optimizer = torch.optim.Adam([weight, *adapter_parameters(adapted)], lr=0.0)
    regauge_optimizer_state(optimizer, adapted, regauge_model(adapted, "svd"))
    assert not optimizer.state
    train(adapted, optimizer, batches(adapted, 2))
    kept = optimizer.state[weight]["exp_avg"].clone()
    regauge_optimizer_state(optimizer, adapted, regauge_model(adapted, "pivot"))
    assert torch.equal(optimizer.state[weight]["exp_avg"], kept)


def test_states_without_a_rule_are_refused_with_nothing_changed(adapted: nn.Module) -> None:
    gauges = regauge_model(adapted, "svd")
    rms = torch.optim.RMSprop(adapter_parameters(adapted), lr=0.0)
    train(adapted, rms, batches(adapted, 2))
    with pytest.raises(AdapterStateError, match=r"RMSprop keeps 'square_avg' for up.lora_B"):
        regauge_optimizer_state(rms, adapted, gauges)
    adam = torch.optim.Adam(adapter_parameters(adapted), lr=0.0)
    train(adapted, adam, batches(adapted, 2))
    before = copy.deepcopy(adam.state_dict())
    with pytest.raises(AdapterStateError, match="'block.up', and the model has no adapter there"):
        regauge_optimizer_state(adam, adapted, {**gauges, "block.up": gauges["up"]})
    with pytest.raises(AdapterStateError, match=r"must have shape \(3, 3\), got \(2, 2\)"):
        regauge_optimizer_state(adam, adapted, {**gauges, "block.down": torch.eye(2)})
    for old, new in zip(before["state"].values(), adam.state_dict()["state"].values(), strict=True):
        assert torch.equal(old["exp_avg"], new["exp_avg"])
