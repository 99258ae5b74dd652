"""Lifting a path of checkpoints, and carrying updates from one base to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gauge_ext.errors import ConfigError, GeometryError
from gauge_ext.geometry.carry import lift, move_base, rebase
from gauge_ext.geometry.hidden_space import HiddenSpace
from gauge_ext.geometry.point import LoRAPoint

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD = 16, 24, 4, 2, 6
SEEDS = st.integers(0, 2**16)
MLP = HiddenSpace(("gate", "up"), ("down",))
VALUES = HiddenSpace(("v",), ("o",), "rotation", KV_HEADS)
KEYS = HiddenSpace(("q", "k"), (), "rotation", KV_HEADS)

Weights = dict[str, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base(seed: int) -> Weights:
    """The weights of one block: gated MLP, and attention with two value heads for four."""
    shapes = {
        "gate": (HIDDEN, WIDTH),
        "up": (HIDDEN, WIDTH),
        "down": (WIDTH, HIDDEN),
        "q": (HEADS * HEAD, WIDTH),
        "k": (KV_HEADS * HEAD, WIDTH),
        "v": (KV_HEADS * HEAD, WIDTH),
        "o": (WIDTH, HEADS * HEAD),
    }
    weights = {
        f"{name}.weight": normal(*shape, seed=seed + i) / shape[1] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }
    weights["up.bias"] = normal(HIDDEN, seed=seed + 50)
    weights["v.bias"] = normal(KV_HEADS * HEAD, seed=seed + 51)
    return weights


def block(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``(tokens, WIDTH)`` through attention and MLP, written out."""
    length = x.shape[0]
    q = (x @ w["q.weight"].T).view(length, HEADS, HEAD).transpose(0, 1)
    k = (x @ w["k.weight"].T).view(length, KV_HEADS, HEAD).transpose(0, 1)
    v = (x @ w["v.weight"].T + w["v.bias"]).view(length, KV_HEADS, HEAD).transpose(0, 1)
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (k, v))
    attended = torch.softmax(q @ k.mT / HEAD**0.5, -1) @ v
    x = x + attended.transpose(0, 1).reshape(length, HEADS * HEAD) @ w["o.weight"].T
    hidden = F.silu(x @ w["gate.weight"].T) * (x @ w["up.weight"].T + w["up.bias"])
    return x + hidden @ w["down.weight"].T


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(normal(HEAD, HEAD, seed=seed)).Q


def reparametrise(weights: Weights, seed: int) -> Weights:
    """The same function: hidden units permuted, each value and each key head rotated."""
    new = dict(weights)
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(seed))
    for key in ("gate.weight", "up.weight", "up.bias"):
        new[key] = weights[key][order]
    new["down.weight"] = weights["down.weight"][:, order]
    turns = [rotation(seed + i) for i in range(KV_HEADS)]
    own, shared = torch.block_diag(*turns), torch.block_diag(*(t for t in turns for _ in "ab"))
    new["v.weight"], new["v.bias"] = own @ weights["v.weight"], own @ weights["v.bias"]
    new["o.weight"] = weights["o.weight"] @ shared.T
    turns = [rotation(seed + 10 + i) for i in range(KV_HEADS)]
    own, shared = torch.block_diag(*turns), torch.block_diag(*(t for t in turns for _ in "ab"))
    new["k.weight"], new["q.weight"] = own @ weights["k.weight"], shared @ weights["q.weight"]
    return new


def updates(weights: Weights, seed: int, rank: int = 3) -> dict[str, LoRAPoint]:
    return {
        key.removesuffix(".weight"): LoRAPoint(
            0.3 * normal(w.shape[0], rank, seed=seed + i), normal(rank, w.shape[1], seed=seed - i)
        )
        for i, (key, w) in enumerate(weights.items())
        if key.endswith(".weight")
    }


def adapted(weights: Weights, points: Mapping[str, LoRAPoint]) -> Weights:
    return weights | {
        f"{name}.weight": weights[f"{name}.weight"] + point.B @ point.A
        for name, point in points.items()
    }


@settings(max_examples=10)
@given(SEEDS)
def test_move_base_is_exact_on_a_pure_reparametrisation(seed: int) -> None:
    old = base(seed)
    new = reparametrise(old, seed)
    points = updates(old, seed)
    x = normal(5, WIDTH, seed=seed)
    torch.testing.assert_close(block(new, x), block(old, x))
    expected = block(adapted(old, points), x)
    moved, fits = move_base(points, old, new, (MLP, VALUES, KEYS))
    torch.testing.assert_close(block(adapted(new, moved), x), expected, rtol=1e-9, atol=1e-9)
    # And it was needed: the updates as they were make another model.
    assert float((block(adapted(new, points), x) - expected).norm() / expected.norm()) > 0.05
    for fit in fits:
        assert fit.correlation == pytest.approx(1, abs=1e-12)
        assert fit.after < 1e-6
        assert fit.before > 0.1


def test_move_base_sees_through_drift() -> None:
    old = base(7)
    true = reparametrise(old, 7)
    new = {
        k: w + 0.28 * w.norm() / w.numel() ** 0.5 * normal(*w.shape, seed=3)
        for k, w in true.items()
    }
    points = updates(old, 7)
    exact, _ = move_base(points, old, true, (MLP, VALUES, KEYS))
    moved, fits = move_base(points, old, new, (MLP, VALUES, KEYS))
    for name, point in moved.items():
        wanted = exact[name].product()
        assert float((point.product() - wanted).norm() / wanted.norm()) < 0.2, name
    permutation = fits[0]
    assert torch.equal(permutation.transform, move_base({}, old, true, (MLP,))[1][0].transform)
    assert all(0.15 < fit.after < 0.4 < fit.before for fit in fits)
    assert all(fit.correlation > 0.9 for fit in fits)


def test_layers_in_no_space_keep_their_updates() -> None:
    old = base(1)
    points = updates(old, 1)
    moved, _ = move_base(points, old, reparametrise(old, 1), (MLP,))
    assert all(moved[name] is points[name] for name in ("q", "k", "v", "o"))
    assert torch.equal(moved["up"].A, points["up"].A)
    assert torch.equal(moved["down"].B, points["down"].B)


def test_the_same_base_moves_nothing() -> None:
    old = base(2)
    points = updates(old, 2)
    moved, fits = move_base(points, old, old, (MLP, VALUES, KEYS))
    for name, point in moved.items():
        torch.testing.assert_close(point.product(), points[name].product())
    assert all(fit.before == 0 and fit.after < 1e-6 for fit in fits)


def test_points_keep_their_dtype() -> None:
    old = base(2)
    points = {name: point.to(torch.float32) for name, point in updates(old, 2).items()}
    moved, _ = move_base(points, old, reparametrise(old, 2), (MLP, VALUES))
    assert {point.dtype for point in moved.values()} == {torch.float32}


class TestMoveBaseRefuses:
    def test_one_matrix_between_two_unknown_bases(self) -> None:
        with pytest.raises(ConfigError, match="at least two different layers"):
            HiddenSpace(("up",), ())
        with pytest.raises(ConfigError, match="at least two different layers"):
            HiddenSpace(("up",), ("up",))
        chain = (HiddenSpace(("up",), ("down",)), HiddenSpace(("down",), ("o",), "rotation"))
        with pytest.raises(ConfigError, match="'down' lies between two hidden spaces"):
            move_base({}, base(0), base(0), chain)

    def test_an_unrelated_base(self) -> None:
        for space in (MLP, VALUES, KEYS):
            with pytest.raises(GeometryError, match="cosine of"):
                move_base({}, base(0), base(1000), (space,))

    def test_layers_that_are_missing_or_do_not_fit(self) -> None:
        old = base(0)
        with pytest.raises(GeometryError, match="no weight of 'nowhere'"):
            move_base({}, old, old, (HiddenSpace(("up",), ("nowhere",)),))
        with pytest.raises(GeometryError, match="hidden units"):
            move_base({}, old, old, (HiddenSpace(("k",), ("o",)),))
        with pytest.raises(GeometryError, match="do not fit a space"):
            move_base({}, old, old, (HiddenSpace(("up",), ("o",), "rotation", 5),))
        with pytest.raises(GeometryError, match="do not fit a space"):
            move_base({}, old, old | {"gate.weight": old["gate.weight"][:8]}, (MLP,))

    def test_a_rotation_that_the_weights_do_not_determine(self) -> None:
        old = base(0)
        old["v.weight"][HEAD - 1] = old["v.bias"][HEAD - 1] = 0
        old["o.weight"][:, [HEAD - 1, 2 * HEAD - 1]] = 0
        with pytest.raises(GeometryError, match="not determined"):
            move_base({}, old, old, (VALUES,))

    def test_weights_of_zeros(self) -> None:
        old = base(0)
        with pytest.raises(GeometryError, match="zero or not finite"):
            move_base({}, old, {k: torch.zeros_like(w) for k, w in old.items()}, (MLP,))

    @pytest.mark.parametrize("kwargs", [{"kind": "scaling"}, {"heads": 0}, {"heads": 2}])
    def test_a_space_that_makes_no_sense(self, kwargs: dict[str, object]) -> None:
        with pytest.raises(ConfigError):
            HiddenSpace(("up",), ("down",), **kwargs)  # type: ignore[arg-type]


def smooth_path(seed: int, steps: int = 13) -> tuple[Tensor, list[Tensor]]:
    """A base, and weights that leave it along a curve of rank 3."""
    b0, b1 = normal(20, 3, seed=seed), normal(20, 3, seed=seed + 1)
    a0, a1 = normal(3, 15, seed=seed + 2), normal(3, 15, seed=seed + 3)
    start = normal(20, 15, seed=seed + 4)
    times = torch.linspace(0, 0.5, steps)
    return start, [start + (b0 + t * b1) @ (a0 + t * a1) for t in times]


def largest_jump(points: Sequence[LoRAPoint]) -> float:
    """The largest relative change of a factor between neighbours."""
    return max(
        float((y.B - x.B).norm() / x.B.norm() + (y.A - x.A).norm() / x.A.norm())
        for x, y in pairwise(points)
    )


def test_lift_is_smooth_where_independent_factors_are_not() -> None:
    start, weights = smooth_path(0)
    lifted = lift(weights, 3, base=start)
    for point, weight in zip(lifted, weights, strict=True):
        torch.testing.assert_close(point.product(), weight - start)
    # Factors made one by one, each with the signs and order that its SVD happened to have.
    alone = []
    for index, weight in enumerate(weights):
        u, s, vh = torch.linalg.svd(weight - start)
        signs = torch.where(normal(3, seed=index) < 0, -1.0, 1.0)
        alone.append(
            LoRAPoint(u[:, :3] * s[:3].sqrt() * signs, (signs * s[:3].sqrt())[:, None] * vh[:3])
        )
    assert largest_jump(lifted) < 0.2
    assert largest_jump(alone) > 1.0
    # So the mean of the factors makes sense.
    truth = torch.stack(weights).mean(0) - start

    def error_of_mean(points: Sequence[LoRAPoint]) -> float:
        b = torch.stack([point.B for point in points]).mean(0)
        a = torch.stack([point.A for point in points]).mean(0)
        return float((b @ a - truth).norm() / truth.norm())

    assert error_of_mean(lifted) < 0.05
    assert error_of_mean(alone) > 0.3


@settings(max_examples=4)
@given(SEEDS)
def test_lift_does_not_depend_on_the_gauges_of_the_nodes(seed: int) -> None:
    start, weights = smooth_path(seed, 6)
    points = lift(weights, 3, base=start)
    turned = [
        point.act(normal(3, 3, seed=seed + i) + 2 * torch.eye(3)) if i else point
        for i, point in enumerate(points)
    ]
    for first, second in zip(lift(turned), points, strict=True):
        torch.testing.assert_close(first.B, second.B, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(first.A, second.A, rtol=1e-7, atol=1e-7)


def test_lift_of_updates_needs_no_base() -> None:
    start, weights = smooth_path(3, 4)
    with_base = lift(weights, 3, base=start)
    without = lift([(w - start).float() for w in weights], 3)
    for first, second in zip(without, with_base, strict=True):
        assert first.dtype == torch.float32
        torch.testing.assert_close(first.B.double(), second.B, rtol=1e-4, atol=1e-4)


def test_lift_refuses_what_is_no_path() -> None:
    start, weights = smooth_path(0, 3)
    with pytest.raises(ConfigError, match="needs a rank"):
        lift(weights, base=start)
    with pytest.raises(GeometryError, match="step 0 of the path has rank 0"):
        lift([start, *weights], 3, base=start)
    with pytest.raises(GeometryError, match="rank 3, and r is 4"):
        lift(weights, 4, base=start)
    with pytest.raises(GeometryError, match="at least one point"):
        lift([])
    with pytest.raises(GeometryError, match="overlap"):
        lift([normal(20, 15, seed=1), normal(20, 15, seed=2)], 2)


@settings(max_examples=20)
@given(st.integers(3, 30), st.integers(3, 30), SEEDS)
def test_rebase_is_the_truncation_of_what_has_to_be_kept(m: int, n: int, seed: int) -> None:
    old, new = normal(m, n, seed=seed), normal(m, n, seed=seed + 1)
    point = LoRAPoint(normal(m, 2, seed=seed + 2), normal(2, n, seed=seed + 3))
    found = rebase(point, old, new, 3)
    assert found is not None
    kept = old + point.B @ point.A - new
    s = torch.linalg.svdvals(kept)
    error = float((kept - found.point.product()).norm())
    assert error <= 1.01 * float(s[3:].norm()) + 1e-9
    assert found.unexplained == pytest.approx(error**2 / float(kept.square().sum()), abs=1e-9)


def test_rebase_keeps_the_adapted_layer_when_the_base_changed_by_low_rank() -> None:
    old = normal(12, 9, seed=0)
    new = old + normal(12, 1, seed=1) @ normal(1, 9, seed=2)
    point = LoRAPoint(normal(12, 2, seed=3), normal(2, 9, seed=4)).to(torch.float32)
    found = rebase(point, old, new, 3)
    assert found is not None
    assert found.point.dtype == torch.float32
    torch.testing.assert_close(
        new + found.point.product(), old + point.product(), rtol=1e-5, atol=1e-5
    )
    default = rebase(point, old, old)
    assert default is not None
    assert default.point.rank == 2
    by_energy = rebase(point, old, new, energy=0.999999)
    assert by_energy is not None
    assert by_energy.point.rank == 3


def test_rebase_onto_the_adapted_base_leaves_nothing() -> None:
    old = torch.zeros(5, 4, dtype=torch.float64)
    point = LoRAPoint(torch.ones(5, 1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64))
    assert rebase(point, old, old + 1) is None


def test_rebase_refuses_other_shapes() -> None:
    point = LoRAPoint(torch.ones(5, 1), torch.ones(1, 4))
    with pytest.raises(GeometryError, match="two bases of its shape"):
        rebase(point, torch.ones(5, 4), torch.ones(4, 5))
