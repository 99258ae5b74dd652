"""TIES, DARE and pruning on the entries of updates: PEFT's formulas on dense products."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_problems import F32, F64, Family, dense, distance, families, regauged
from torch import Tensor

from gauge_ext.errors import ConfigError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging import combine
from gauge_ext.merging.elementwise import drop, elect, trim

merge_utils = pytest.importorskip("peft.utils.merge_utils")

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def positive(family: Family) -> list[float]:
    return [abs(weight) for weight in family.weights()]


def peft_on_products(name: str, points: list[LoRAPoint], weights: list[float], d: float) -> Tensor:
    """PEFT's own formula on what it calls delta weights, which have no gauge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a density of 1
        function: Callable[..., Tensor] = getattr(merge_utils, name)
        return function([dense(p) for p in points], torch.tensor(weights, dtype=F64), d)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@settings(max_examples=15)
@given(family=families(condition=50.0), density=st.floats(0.05, 1.0))
def test_the_result_is_pefts_formula_on_the_products(
    method: str, family: Family, density: float
) -> None:
    points, weights = family.points(), positive(family)
    expected = peft_on_products(method, points, weights, density)
    # With room for every rank nothing is cut, and the formulas are compared alone.
    room = LoRAPoint(torch.zeros(family.m, 40, dtype=F64), torch.zeros(40, family.n, dtype=F64))
    found = combine([*points, room], [*weights, 1.0], method=method, density=density)
    assert distance(found.point, expected) < 1e-11


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("space", ["entries", "knots"])
@settings(max_examples=10)
@given(family=families(most=3), density=st.floats(0.05, 1.0))
def test_the_result_does_not_depend_on_gauges(
    method: str, space: str, family: Family, density: float
) -> None:
    points, weights = family.points(), positive(family)
    generator = torch.Generator().manual_seed(family.seed)
    twisted = [regauged(point, 600.0, generator) for point in points]
    options = {"method": method, "space": space, "density": density, "seed": 3}
    first, second = (combine(p, weights, **options) for p in (points, twisted))
    expected = dense(first.point)
    assert float((dense(second.point) - expected).norm() / expected.norm().clamp(1e-9)) < 1e-10


def test_ties_on_factors_as_in_peft_depends_on_gauges() -> None:
    points = Family(30, 20, (4, 4), F64, 1.0, seed=1).points()
    generator = torch.Generator().manual_seed(2)
    twisted = [regauged(point, 50.0, generator) for point in points]

    def on_factors(chosen: list[LoRAPoint]) -> Tensor:
        weights = torch.ones(2, dtype=F64)
        b = merge_utils.ties([point.B for point in chosen], weights, 0.5)
        return b @ merge_utils.ties([point.A for point in chosen], weights, 0.5)

    assert distance(on_factors(twisted), on_factors(points)) > 0.5
    options = {"method": "ties", "density": 0.5}
    first, second = (combine(p, [1.0, 1.0], **options).point for p in (points, twisted))
    assert distance(second, dense(first)) < 1e-10


def test_entries_that_are_zero_have_no_vote_in_any_gauge() -> None:
    # Rows of B that are zero give zero rows of X, and rounding in another gauge gives them signs.
    points = Family(20, 15, (3, 3), F64, 1.0, seed=1).points()
    b = points[1].B.clone()
    b[:10] = 0.0
    sparse = LoRAPoint(b, points[1].A)
    generator = torch.Generator().manual_seed(2)
    rotated = regauged(sparse, 300.0, generator)
    noisy = LoRAPoint(rotated.B + 1e-18 * torch.randn(20, 3, dtype=F64), rotated.A)
    for chosen in (sparse, rotated, noisy):
        found = combine([points[0], chosen], [1.0, 1.0], method="ties", density=1.0, rank=15)
        expected = peft_on_products("ties", [points[0], sparse], [1.0, 1.0], 1.0)
        kept = min(15, 6)
        u, s, vh = torch.linalg.svd(expected, full_matrices=False)
        assert distance(found.point, (u[:, :kept] * s[:kept]) @ vh[:kept]) < 1e-10


def test_dare_keeps_the_share_and_the_expectation() -> None:
    x = torch.randn(60, 50, dtype=F64)
    kept = drop(x, 0.3, seed=5)
    assert torch.equal(kept[kept != 0], (x / 0.3)[kept != 0])
    assert abs(float((kept != 0).double().mean()) - 0.3) < 0.03
    mean = torch.stack([drop(x, 0.3, seed) for seed in range(400)]).mean(0)
    # the deviation of a mean of 400 is sqrt((1 - p) / p / 400) of the entry: 7.6%
    assert float((mean - x).norm() / x.norm()) < 0.1
    assert torch.equal(drop(x, 1.0, seed=5), x)


def test_dare_is_the_weighted_sum_on_average() -> None:
    points = Family(10, 8, (2, 2), F64, 20.0, seed=1).points()
    total = torch.zeros(10, 8, dtype=F64)
    for seed in range(200):
        options = {"density": 0.6, "seed": seed, "space": "knots"}
        total += dense(combine(points, [1.0, -0.5], method="dare_linear", **options).point)
    expected = dense(points[0]) - 0.5 * dense(points[1])
    assert distance(total / 200, expected) < 0.15


def test_a_seed_gives_one_result_and_another_seed_another() -> None:
    points = Family(20, 15, (3, 2), F64, 1.0, seed=1).points()
    options = {"method": "dare_ties", "density": 0.5}
    state = torch.get_rng_state()
    first, again, other = (combine(points, [1.0, 1.0], seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.point.B, again.point.B)
    assert distance(other.point, dense(first.point)) > 0.1


def test_each_task_drops_entries_of_its_own() -> None:
    (point,) = Family(20, 15, (3,), F64, 1.0, seed=1).points()
    options = {"method": "dare_linear", "density": 0.5, "rank": 15}
    difference = combine([point, point], [1.0, -1.0], **options)
    assert float(difference.point.product().norm()) > 0.1 * float(dense(point).norm())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_trim_keeps_the_largest(density: float) -> None:
    x = torch.randn(3, 12, 9, dtype=F64)
    kept = trim(x, density)
    for before, after in zip(x, kept, strict=True):
        count = max(1, int(density * 108))
        assert int((after != 0).sum()) == count
        bar = before.abs().flatten().sort(descending=True).values[count - 1]
        assert torch.equal(after, before * (before.abs() >= bar))


def test_where_signs_cancel_nothing_is_elected() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0]], dtype=F64)
    y = torch.tensor([[-1.0, -4.0, -1.0, 5.0]], dtype=F64)
    found = elect([lambda: x, lambda: y], [1.0, 1.0], torch.tensor(1e-12, dtype=F64))
    assert torch.equal(found, torch.tensor([[0.0, -3.0, 3.0, 5.0]], dtype=F64))


def test_a_large_layer_is_cut_within_a_percent_of_the_optimum() -> None:
    points = Family(300, 280, (4, 4), F32, 10.0, seed=1).points()
    expected = peft_on_products("ties", points, [1.0, 1.0], 0.3)
    found = combine(points, [1.0, 1.0], method="ties", density=0.3, rank=6)
    sigma = torch.linalg.svdvals(expected)
    optimum = float(sigma[6:].norm() / sigma.norm())
    assert found.point.rank == 6
    assert 0.9999 * optimum < float(found.truncation) < 1.01 * optimum
    assert abs(distance(found.point, expected) - float(found.truncation)) < 1e-5


def test_updates_too_large_to_be_formed_are_refused() -> None:
    point = LoRAPoint(torch.randn(10_000, 1), torch.randn(1, 10_000))
    with pytest.raises(ConfigError, match="100,000,000 entries") as info:
        combine([point], [1.0], method="ties", density=0.2)
    assert "knots" in str(info.value.hint)
    found = combine([point], [1.0], method="ties", density=1.0, space="knots")
    left = found.point.B[:50] @ found.point.A[:, :50]
    torch.testing.assert_close(left, point.B[:50] @ point.A[:, :50])
