"""Properties 39 and 41: training the update, whatever its factors, its gauge and its alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import F64, difference, gauge, model, run, train, updates

from gauge_ext.models import regauge_model, regauge_optimizer_state
from gauge_ext.optim import create_optimizer

INVARIANT: list[tuple[str, dict[str, Any]]] = [
    ("scaled_gd", {"lr": 0.3}),
    ("scaled_gd", {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("gauge_adam", {"lr": 0.01}),
    ("gauge_adam", {"lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 0.05, "damping": 1e-6}),
    ("lora_rite", {"lr": 0.01, "weight_decay": 0.1}),
]
every = pytest.mark.parametrize(("name", "options"), INVARIANT)


@every
@pytest.mark.parametrize("zero", [True, False], ids=["from B = 0", "trained"])
def test_twenty_steps_are_the_same_in_every_gauge(
    name: str, options: dict[str, Any], zero: bool
) -> None:
    want = run(name, options, zero=zero)
    start = updates(model(zero=zero))
    assert difference(want, start) > 0.1 if not zero else bool(want.any())
    for condition in (1.0, 100.0):
        assert difference(run(name, options, zero=zero, g=gauge(condition)), want) < 1e-9
    # The scale of a factor is a gauge too, and the one that initializations differ in.
    assert difference(run(name, options, zero=zero, g=10 * torch.eye(4, dtype=F64)), want) < 1e-9


@every
def test_single_precision_is_invariant_to_its_rounding(name: str, options: dict[str, Any]) -> None:
    want = run(name, options, zero=False, dtype=torch.float32)
    moved = run(name, options, zero=False, dtype=torch.float32, g=gauge(100.0))
    assert difference(moved, want) < 1e-3


@every
@pytest.mark.parametrize("zero", [True, False])
def test_alpha_does_not_matter(name: str, options: dict[str, Any], zero: bool) -> None:
    want = run(name, options, zero=zero, alpha=4.0)
    assert difference(run(name, options, zero=zero, alpha=37.0), want) < 1e-10


@pytest.mark.parametrize("name", ["adamw", "lora_plus"])
def test_adamw_depends_on_the_gauge_and_on_alpha(name: str) -> None:
    options = {"lr": 0.01}
    want = run(name, options)
    assert difference(run(name, options, g=gauge(100.0)), want) > 0.1
    assert difference(run(name, options, alpha=37.0), want) > 0.1


@every
def test_a_change_of_gauge_in_the_middle_changes_nothing(
    name: str, options: dict[str, Any]
) -> None:
    results = []
    for regauged in (False, True):
        net = model(zero=False)
        optimizer = create_optimizer(net, name, **options)
        train(net, optimizer, 10)
        if regauged:
            regauge_optimizer_state(optimizer, net, regauge_model(net, "svd"))
        train(net, optimizer, 10, first=10)
        results.append(updates(net))
    assert difference(results[1], results[0]) < 1e-9
