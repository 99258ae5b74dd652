"""KnOTS in factor form: the coordinates that the dense decomposition gives, without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from merging_problems import F64, Family, dense, distance, families, regauged

from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging import combine
from gauge_ext.merging.spaces import knots

merge_utils = pytest.importorskip("peft.utils.merge_utils")


@settings(max_examples=15)
@given(family=families(condition=100.0))
def test_the_coordinates_are_those_of_the_dense_decomposition(family: Family) -> None:
    points = family.points()
    basis, coordinates = knots(points)
    side_by_side = torch.cat([dense(point) for point in points], 1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    scale = float(s[0])
    rank = int((s > 1e-10 * scale).sum())
    count = basis.shape[-1]
    for index, (point, found) in enumerate(zip(points, coordinates, strict=True)):
        assert distance(basis @ found, dense(point)) < 1e-11
        block = vh[:, index * family.n : (index + 1) * family.n]
        # singular vectors are unique up to one sign for all blocks of a row
        for row in range(min(rank, count)):
            sign = torch.sign(u[:, row] @ basis[:, row])
            gap = float((found[row] - sign * s[row] * block[row]).abs().max())
            nearest = (s - s[row]).abs()
            nearest[row] = torch.inf
            assert gap < 1e-11 * scale * max(1.0, scale / float(nearest.min()))


@settings(max_examples=15)
@given(family=families(condition=50.0))
def test_knots_is_ties_on_the_dense_coordinates(family: Family) -> None:
    points = family.points()
    weights = [abs(weight) for weight in family.weights()]
    side_by_side = torch.cat([dense(point) for point in points], 1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    kept = s > 1e-10 * s[0]
    rows = (s[kept, None] * vh[kept]).split(family.n, dim=1)
    merged = merge_utils.ties(list(rows), torch.tensor(weights, dtype=F64), 0.4)
    # PEFT keeps a share of what there is; ours counts the rows that rank leaves empty as well.
    expected = u[:, kept] @ merged
    full = min(family.m, sum(family.ranks))
    density = (int(0.4 * rows[0].numel()) + 0.5) / (full * family.n)
    found = combine(points, weights, method="knots", density=density)
    assert distance(found.point, expected) < 1e-9


def test_knots_is_ties_in_its_space() -> None:
    points = Family(20, 15, (3, 2), F64, 10.0, seed=1).points()
    first = combine(points, [1.0, 0.5], method="knots", density=0.3)
    second = combine(points, [1.0, 0.5], method="ties", density=0.3, space="knots")
    assert torch.equal(first.point.B, second.point.B)


def test_equal_updates_lie_on_the_same_coordinates() -> None:
    (point,) = Family(20, 15, (4,), F64, 10.0, seed=1).points()
    copy = regauged(point, 600.0, torch.Generator().manual_seed(3))
    _, (first, second) = knots([point, copy])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-11)
    # Everything agrees, so the mean is the update itself.
    found = combine([point, copy], [1.0, 1.0], method="knots", density=1.0)
    assert found.point.rank == 4
    assert distance(found.point, dense(point)) < 1e-11


def test_a_task_of_zeros_changes_nothing() -> None:
    (point,) = Family(20, 15, (4,), F64, 10.0, seed=1).points()
    fresh = LoRAPoint(torch.zeros(20, 2, dtype=F64), torch.randn(2, 15, dtype=F64))
    found = combine([point, fresh], [1.0, 1.0], method="knots", density=1.0)
    assert distance(found.point, dense(point)) < 1e-11
