"""Weighted sums and compression: equal to dense sums and dense decompositions, in every gauge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_problems import F32, F64, Family, dense, dense_sum, distance, families, regauged

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging import combine, compress, weighted_sum

TOLERANCE = {F64: 1e-12, F32: 1e-5}
both = pytest.mark.parametrize("dtype", [F64, F32], ids=str)


@both
@settings(max_examples=25)
@given(data=st.data())
def test_the_combination_is_the_weighted_sum(dtype: torch.dtype, data: st.DataObject) -> None:
    family = data.draw(families(dtype))
    points, weights = family.points(), family.weights()
    expected = dense_sum(points, weights)
    found = combine(points, weights)
    assert found.point.dtype == dtype
    assert found.point.rank <= min(family.m, family.n, sum(family.ranks))
    assert distance(found.point, expected) < TOLERANCE[dtype]
    assert float(found.deviation) < TOLERANCE[dtype]
    torch.testing.assert_close(found.norm, expected.norm(), rtol=1e-10, atol=0.0)


@both
@settings(max_examples=25)
@given(data=st.data(), rank=st.integers(1, 8))
def test_the_error_is_the_tail_of_the_dense_decomposition(
    dtype: torch.dtype, data: st.DataObject, rank: int
) -> None:
    family = data.draw(families(dtype))
    points, weights = family.points(), family.weights()
    expected = dense_sum(points, weights)
    sigma = torch.linalg.svdvals(expected)
    found = combine(points, weights, rank=rank)
    tail = float(sigma[rank:].norm() / sigma.norm())
    assert abs(float(found.deviation) - tail) < {F64: 1e-12, F32: 1e-6}[dtype]
    assert float(found.truncation) == float(found.deviation)
    assert found.point.rank <= rank
    # and what came out is that far from the sum: no other matrix of the rank is closer
    assert abs(distance(found.point, expected) - tail) < TOLERANCE[dtype]


@settings(max_examples=20)
@given(family=families(condition=1.0))
def test_a_gauge_of_condition_1e5_does_not_hurt(family: Family) -> None:
    points, weights = family.points(), family.weights()
    generator = torch.Generator().manual_seed(family.seed)
    twisted = [regauged(point, 1e5, generator) for point in points]
    expected = dense_sum(points, weights)
    assert distance(combine(twisted, weights).point, expected) < 1e-9
    ranked = combine(points, weights, rank=2)
    assert abs(float(combine(twisted, weights, rank=2).deviation - ranked.deviation)) < 1e-9


def test_the_rank_is_that_of_the_sum_and_not_of_its_factors() -> None:
    family = Family(20, 15, (3, 2), F64, 50.0, seed=1)
    first, second = family.points()
    generator = torch.Generator().manual_seed(2)
    copies = [first, regauged(first, 100.0, generator), second, regauged(second, 10.0, generator)]
    found = combine(copies, [0.5, 0.5, 1.0, 2.0])
    assert found.point.rank == 5
    assert distance(found.point, dense(first) + 3 * dense(second)) < 1e-12


def test_the_difference_of_an_update_and_a_regauged_copy_is_zero() -> None:
    (point,) = Family(20, 15, (4,), F64, 50.0, seed=1).points()
    copy = regauged(point, 1e4, torch.Generator().manual_seed(2))
    found = combine([point, copy], [1.0, -1.0])
    assert found.point.rank == 1
    assert not found.point.B.any()
    assert not found.point.A.any()
    assert float(found.norm) == float(found.deviation) == float(found.truncation) == 0.0


def test_updates_of_zero_are_added() -> None:
    (point,) = Family(20, 15, (4,), F32, 1.0, seed=1).points()
    fresh = LoRAPoint(torch.zeros(20, 3), torch.randn(3, 15))
    assert distance(combine([fresh, point], [1.0, 2.0]).point, 2 * dense(point)) < 1e-5
    assert not combine([fresh], [1.0]).point.B.any()


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_the_energy_takes_the_smallest_rank_that_keeps_it(energy: float) -> None:
    (point,) = Family(30, 20, (8,), F64, 100.0, seed=3).points()
    squares = torch.linalg.svdvals(dense(point))[:8].square()
    shares = squares.cumsum(0) / squares.sum()
    expected = next(k for k in range(1, 9) if k == 8 or shares[k - 1] >= energy)
    assert compress(point, energy=energy).point.rank == expected
    assert compress(point, energy=energy, rank=2).point.rank == min(2, expected)


def test_what_is_compressed_is_balanced() -> None:
    (point,) = Family(30, 20, (6,), F64, 100.0, seed=3).points()
    found = compress(point, rank=4)
    sigma = torch.linalg.svdvals(dense(point))
    expected = torch.diag(sigma[:4])
    torch.testing.assert_close(found.point.B.mT @ found.point.B, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.point.A @ found.point.A.mT, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.singular_values, sigma[:6])


def test_the_factors_of_what_is_compressed_do_not_depend_on_the_gauge() -> None:
    (point,) = Family(30, 20, (6,), F64, 100.0, seed=3).points()
    twisted = regauged(point, 1e3, torch.Generator().manual_seed(4))
    first, second = compress(point, rank=4).point, compress(twisted, rank=4).point
    torch.testing.assert_close(second.B, first.B, rtol=0, atol=1e-9)
    torch.testing.assert_close(second.A, first.A, rtol=0, atol=1e-9)


def test_a_batch_is_a_loop() -> None:
    seeds = range(3)
    rows = [Family(12, 9, (3, 2), F64, 10.0, seed=s).points() for s in seeds]
    batch = [
        LoRAPoint(torch.stack([r[i].B for r in rows]), torch.stack([r[i].A for r in rows]))
        for i in range(2)
    ]
    methods = ({}, {"method": "ties", "density": 0.3}, {"method": "knots", "density": 0.3})
    for options in methods:
        found = combine(batch, [1.0, 0.5], rank=2, **options)
        assert found.deviation.shape == found.truncation.shape == found.norm.shape == (3,)
        for index, row in enumerate(rows):
            single = combine(row, [1.0, 0.5], rank=2, **options)
            torch.testing.assert_close(found.point.product()[index], single.point.product())
            torch.testing.assert_close(found.deviation[index], single.deviation)


def test_half_precision_comes_back_as_such() -> None:
    (point,) = Family(20, 15, (3,), F32, 1.0, seed=1).points()
    half = point.to(torch.bfloat16)
    found = combine([half, half], [0.5, 0.5])
    assert found.point.dtype == torch.bfloat16
    assert found.point.rank == 3
    assert distance(found.point, dense(half)) < 1e-2


def test_the_widest_dtype_wins() -> None:
    first, second = Family(20, 15, (3, 2), F32, 1.0, seed=1).points()
    assert combine([first.to(torch.bfloat16), second], [1.0, 1.0]).point.dtype == F32


def test_weighted_sum_places_factors_side_by_side() -> None:
    first, second = Family(8, 7, (3, 2), F64, 1.0, seed=1).points()
    found = weighted_sum([first, second], [2.0, -1.0])
    assert torch.equal(found.B, torch.cat([2 * first.B, -second.B], 1))
    assert torch.equal(found.A, torch.cat([first.A, second.A]))


def test_updates_of_different_shapes_are_refused() -> None:
    (first,) = Family(8, 7, (3,), F64, 1.0, seed=1).points()
    (second,) = Family(8, 6, (3,), F64, 1.0, seed=1).points()
    with pytest.raises(GeometryError, match=r"\(8, 6\), \(8, 7\)"):
        combine([first, second], [1.0, 1.0])
    with pytest.raises(GeometryError, match="at least one"):
        weighted_sum([], [])


def test_nan_and_infinity_are_refused() -> None:
    first, second = Family(8, 7, (3, 2), F64, 1.0, seed=1).points()
    second.A[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="update 2"):
        combine([first, second], [1.0, 1.0])
    second.A[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="update 1"):
        compress(second)


def test_points_that_require_gradients_are_combined_without_them() -> None:
    first, second = Family(8, 7, (3, 2), F64, 1.0, seed=1).points()
    first.B.requires_grad_()
    for options in ({}, {"method": "ties", "density": 0.5}):
        assert not combine([first, second], [1.0, 1.0], **options).point.B.requires_grad
    assert not compress(first, rank=1).point.B.requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rank": 0}, "rank"), ({"energy": 0.0}, "energy"), ({"energy": 1.5}, "energy")],
)
def test_a_rank_or_energy_that_cannot_be_is_refused(options: dict[str, float], said: str) -> None:
    (point,) = Family(8, 7, (3,), F64, 1.0, seed=1).points()
    with pytest.raises(ConfigError, match=said):
        compress(point, **options)
