"""The optimizers are torch optimizers: groups, closures, schedules, state, scaled gradients."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from optim_problems import F64, difference, loss_of, model, train, updates
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.optim import (
    FactorOptimizer,
    FactorPair,
    GaugeAdam,
    LoRARITE,
    ScaledGD,
    create_optimizer,
    factor_pairs,
)

EVERY: list[tuple[Any, dict[str, Any]]] = [
    (ScaledGD, {"lr": 0.03, "momentum": 0.9}),
    (GaugeAdam, {"lr": 0.01}),
    (LoRARITE, {"lr": 0.01}),
]
every = pytest.mark.parametrize(("kind", "options"), EVERY)


def with_head(**how: Any) -> nn.Module:
    """The model with one bias that is trained beside the adapters."""
    net = model(**how)
    net[2].bias.requires_grad_(True)
    return net


def make(kind: Any, net: nn.Module, options: dict[str, Any]) -> FactorOptimizer:
    return kind([{"pairs": factor_pairs(net)}, {"params": [net[2].bias], "lr": 0.05}], **options)


@every
def test_the_loss_falls(kind: Any, options: dict[str, Any]) -> None:
    net = model()
    losses = train(net, kind(factor_pairs(net), **{**options, "lr": 5 * options["lr"]}), 60)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@every
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_resuming_from_a_state_dict_goes_on_as_if_uninterrupted(
    kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    net = with_head(dtype=dtype)
    optimizer = make(kind, net, options)
    train(net, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, 5, first=5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = with_head(dtype=dtype)
    other.load_state_dict(saved["model"])
    resumed = make(kind, other, options)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 5, first=5)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@every
def test_what_is_no_factor_is_trained_by_adamw(kind: Any, options: dict[str, Any]) -> None:
    net, twin = with_head(), with_head()
    optimizer = make(kind, net, {**options, "weight_decay": 0.1})
    plain = torch.optim.AdamW([twin[2].bias], lr=0.05, weight_decay=0.1)
    for step in range(4):
        for one, its in ((net, optimizer), (twin, plain)):
            its.zero_grad()
            loss_of(one, step).backward()
            its.step()
        assert torch.allclose(net[2].bias, twin[2].bias, rtol=0, atol=1e-14)
        with torch.no_grad():  # let the twin follow, so that the gradients stay the same
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                q.copy_(p)


@every
def test_a_schedule_a_closure_and_a_scaler_do_what_they_do_elsewhere(
    kind: Any, options: dict[str, Any]
) -> None:
    results = []
    for way in ("plain", "closure", "scaler"):
        net = model(zero=False)
        optimizer = kind(factor_pairs(net), **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(6):

            def closure(step: int = step, net: Any = net, optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            if way == "closure":
                assert float(optimizer.step(closure).detach()) > 0
            elif way == "scaler":
                optimizer.zero_grad()
                scaler.scale(loss_of(net, step)).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                closure()
                assert optimizer.step() is None
            schedule.step()
        results.append(updates(net))
    assert difference(results[1], results[0]) < 1e-14
    assert difference(results[2], results[0]) < 1e-10


@every
def test_copies_and_pickles_go_on_alone(kind: Any, options: dict[str, Any]) -> None:
    net = model()
    optimizer = kind(factor_pairs(net), **options)
    train(net, optimizer, 3)
    twin, its = pickle.loads(pickle.dumps((net, optimizer)))
    other, others = copy.deepcopy((net, optimizer))
    for one, by in ((net, optimizer), (twin, its), (other, others)):
        train(one, by, 3, first=3)
    assert torch.equal(updates(net), updates(twin))
    assert torch.equal(updates(net), updates(other))


@every
def test_pairs_without_gradients_stay_and_count_no_step(kind: Any, options: dict[str, Any]) -> None:
    net = model(zero=False)
    optimizer = kind(factor_pairs(net), **options)
    first, second = factor_pairs(net)
    loss_of(net, 0).backward()
    first.lora_A.grad = first.lora_B.grad = None
    old = first.lora_A.detach().clone(), second.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(first.lora_A, old[0])
    assert not torch.equal(second.lora_A, old[1])
    assert first.lora_A not in optimizer.state


def test_weight_decay_shrinks_the_update() -> None:
    net = model(zero=False)
    old = updates(net)
    optimizer = ScaledGD(factor_pairs(net), lr=0.1, weight_decay=0.5)
    for pair in factor_pairs(net):
        for factor in pair[:2]:
            factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close(updates(net), (1 - 0.05) * old, rtol=1e-13, atol=0)


def test_clipping_bounds_the_invariant_norm() -> None:
    moved = []
    for limit in (None, 1e-3):
        net = model(zero=False)
        optimizer = ScaledGD(factor_pairs(net), lr=0.1, max_grad_norm=limit)
        old = [p.lora_B.detach().clone() for p in factor_pairs(net)]
        loss_of(net, 0).backward()
        norm = float(optimizer.grad_norm())
        optimizer.step()
        new = [p.lora_B.detach() for p in factor_pairs(net)]
        moved.append(torch.cat([(x - y).flatten() for x, y in zip(new, old, strict=True)]))
    torch.testing.assert_close(moved[1], moved[0] * 1e-3 / norm, rtol=2e-2, atol=0)


def test_autograd_notices_that_factors_changed() -> None:
    net = model(zero=False)
    optimizer = GaugeAdam(factor_pairs(net))
    loss = loss_of(net, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_convolutions_are_trained_as_the_matrices_they_are() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(3)
        a = torch.randn(3, 4, 3, 3, generator=generator, dtype=F64)
        b = torch.randn(6, 3, 1, 1, generator=generator, dtype=F64)
        a = nn.Parameter(a.to(memory_format=layout))
        b = nn.Parameter(b)
        target = torch.randn(6, 36, generator=generator, dtype=F64)
        optimizer = GaugeAdam([FactorPair(a, b, 0.5)], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            x = 0.5 * b.flatten(1) @ a.contiguous().flatten(1)
            (x - target).square().sum().backward()
            optimizer.step()
        results.append((0.5 * b.flatten(1) @ a.contiguous().flatten(1)).detach())
    flat_a = nn.Parameter(torch.randn(3, 36, dtype=F64))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        flat_a.copy_(torch.randn(3, 4, 3, 3, generator=generator, dtype=F64).flatten(1))
    flat_b = nn.Parameter(torch.randn(6, 3, 1, 1, generator=generator, dtype=F64).flatten(1))
    target = torch.randn(6, 36, generator=generator, dtype=F64)
    optimizer = GaugeAdam([FactorPair(flat_a, flat_b, 0.5)], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * flat_b @ flat_a - target).square().sum().backward()
        optimizer.step()
    for got in results:
        torch.testing.assert_close(got, (0.5 * flat_b @ flat_a).detach())


def test_sparse_gradients_are_refused() -> None:
    a, b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
    optimizer = GaugeAdam([FactorPair(a, b)])
    a.grad, b.grad = torch.zeros(2, 5).to_sparse(), torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match="need dense gradients"):
        optimizer.step()


def test_options_that_cannot_be_used_are_named() -> None:
    pairs = factor_pairs(model())
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (GaugeAdam, {"lr": -1.0}, "lr must be a number of at least 0, got -1"),
        (GaugeAdam, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        (GaugeAdam, {"damping": -1e-3}, "damping must be a number of at least 0"),
        (ScaledGD, {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
        (ScaledGD, {"nesterov": True}, "nesterov needs a momentum above 0"),
        (LoRARITE, {"max_grad_norm": 0.0}, "max_grad_norm must be above 0 or None, got 0"),
    ]
    for kind, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            kind(pairs, **options)
    with pytest.raises(ConfigError, match="either pairs or params"):
        GaugeAdam([{"pairs": pairs, "params": []}])
    with pytest.raises(ConfigError, match=r"must have shapes \(r, in, ...\) and \(out, r\), got"):
        GaugeAdam([FactorPair(pairs[0].lora_B, pairs[0].lora_A)])
    with pytest.raises(ConfigError, match="scaling of a pair must be finite and not 0, got 0"):
        GaugeAdam([FactorPair(pairs[0].lora_A, pairs[0].lora_B, 0.0)])


def test_create_optimizer_groups_by_the_other_learning_rate() -> None:
    net = with_head()
    optimizer = create_optimizer(net, "gauge_adam", lr=0.01, other_lr=0.002, damping=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002]
    assert optimizer.param_groups[0]["damping"] == 1e-5
    train(net, optimizer, 2)


def test_lora_rite_refuses_a_state_that_is_not_its_own() -> None:
    net = model()
    optimizer = LoRARITE(factor_pairs(net), lr=0.01)
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    earlier = copy.deepcopy(saved)
    for state in earlier["state"].values():
        state.pop("frame_rest", None)
    other = GaugeAdam(factor_pairs(net), lr=0.01)
    train(net, other, 1)
    fresh = LoRARITE(factor_pairs(net), lr=0.01)
    with pytest.raises(ConfigError, match="holds frame, frame_avg, frame_sq, step, and .*rest"):
        fresh.load_state_dict(earlier)
    with pytest.raises(ConfigError, match="holds column_sq, exp_avg, step, and LoRARITE keeps"):
        fresh.load_state_dict(other.state_dict())
    assert not fresh.state
    fresh.load_state_dict(saved)
    assert fresh.state[net[0].lora_B]["frame_rest"].dtype == F64


def test_a_gradient_that_is_not_finite_is_no_step_of_lora_rite() -> None:
    net = model()
    optimizer = LoRARITE(factor_pairs(net), lr=0.01)
    train(net, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict()), updates(net)
    loss_of(net, 1).backward()
    net[0].lora_B.grad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="Leave such a step out, as torch.amp.GradScaler does"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(updates(net), before[1], rtol=0, atol=0)
