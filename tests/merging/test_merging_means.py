"""Means of factors: right for versions of one adapter, refused for others, in every gauge."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_problems import F64, Family, dense, dense_sum, distance, regauged, versions
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.transport import link
from gauge_ext.merging import alignment, combine
from gauge_ext.merging.means import balanced_frame, bures_mean
from gauge_ext.merging.recipe import MEANS

every_mean = pytest.mark.parametrize("method", MEANS)
WEIGHTS = [0.3, 0.9, 0.6]


@every_mean
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), r=st.integers(1, 5), condition=st.floats(1.0, 600.0))
def test_the_mean_of_one_update_in_many_gauges_is_that_update(
    method: str, seed: int, r: int, condition: float
) -> None:
    (point,) = Family(25, 18, (r,), F64, 1.0, seed).points()
    generator = torch.Generator().manual_seed(seed)
    copies = [regauged(point, condition, generator) for _ in WEIGHTS]
    found = combine(copies, WEIGHTS, method=method)
    assert distance(found.point, sum(WEIGHTS) * dense(point)) < 1e-11


@every_mean
@pytest.mark.parametrize("size", [0.05, 0.4])
def test_the_mean_does_not_depend_on_gauges(method: str, size: float) -> None:
    points = versions(1, 3, size)
    generator = torch.Generator().manual_seed(5)
    twisted = [regauged(point, 300.0, generator) for point in points]
    first = combine(points, WEIGHTS, method=method)
    second = combine(twisted, WEIGHTS, method=method)
    assert distance(second.point, dense(first.point)) < 1e-9


@pytest.mark.parametrize("method", ["bures", "karcher"])
def test_the_mean_does_not_depend_on_the_order(method: str) -> None:
    points = versions(2, 3, 0.4)
    results = [
        dense(combine([points[i] for i in p], [WEIGHTS[i] for i in p], method=method).point)
        for p in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        assert distance(result, results[0]) < 1e-9


@every_mean
def test_versions_that_are_near_have_a_mean_near_their_sum(method: str) -> None:
    # The cross terms that a mean of factors misses are of second order in the distance.
    errors = []
    for size in (0.2, 0.1, 0.05):
        points = versions(3, 3, size)
        found = combine(points, WEIGHTS, method=method)
        expected = dense_sum(points, WEIGHTS)
        assert abs(distance(found.point, expected) - float(found.deviation)) < 1e-10
        errors.append(float(found.deviation))
    assert errors[0] < 0.05
    assert 3.0 < errors[0] / errors[1] < 5.0
    assert 3.0 < errors[1] / errors[2] < 5.0


@every_mean
def test_the_mean_of_multiples_is_that_of_their_roots(method: str) -> None:
    # In balanced frames c X is sqrt(c) Y, for which every alignment is trivial.
    (point,) = Family(25, 18, (3,), F64, 1.0, 7).points()
    points = [LoRAPoint(factor * point.B, point.A) for factor in (1.0, 4.0, 2.25)]
    found = combine(points, [0.2, 0.5, 0.3], method=method)
    root = 0.2 * 1.0 + 0.5 * 2.0 + 0.3 * 1.5
    assert distance(found.point, root**2 * dense(point)) < 1e-11


def embedded(x: Tensor) -> np.ndarray:
    """The positive semidefinite matrix [[(XXᵀ)^½, X], [Xᵀ, (XᵀX)^½]], by scipy."""
    a = x.numpy()
    u, s, vh = scipy.linalg.svd(a, full_matrices=False)
    left, right = (u * s) @ u.T, (vh.T * s) @ vh
    return np.block([[left, a], [a.T, right]])


def squared_bures(p: np.ndarray, q: np.ndarray) -> float:
    """tr P + tr Q - 2 tr (P^½ Q P^½)^½, with roots by eigenvalues."""

    def root(x: np.ndarray) -> np.ndarray:
        values, vectors = scipy.linalg.eigh(x)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    half = root(p)
    cross = np.sqrt(scipy.linalg.eigvalsh(half @ q @ half).clip(0)).sum()
    return float(np.trace(p) + np.trace(q) - 2 * cross)


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_the_bures_mean_minimises_the_sum_of_squared_bures_distances(size: float) -> None:
    points = versions(4, 3, size, m=9, n=7, r=2)
    shares = [0.2, 0.3, 0.5]
    targets = [embedded(dense(point)) for point in points]

    def objective(b: Tensor, a: Tensor) -> float:
        # Y Yᵀ for any Y of this shape, balanced or not
        y = torch.cat([b, a.mT]).numpy()
        return sum(
            share * squared_bures(y @ y.T, target)
            for share, target in zip(shares, targets, strict=True)
        )

    mean = combine(points, shares, method="bures").point
    # The minimiser over all Y is not balanced itself, so compare it at the frame that was found.
    frame = bures_mean([balanced_frame(point) for point in points], shares)
    b, a = frame[:9], frame[9:].mT
    assert distance(mean, b @ a) < 1e-11
    least = objective(b, a)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for step in (1e-1, 1e-2, 1e-3):
            db = step * torch.randn(b.shape, generator=generator, dtype=F64)
            da = step * torch.randn(a.shape, generator=generator, dtype=F64)
            assert objective(b + db, a + da) > least - 1e-9


def test_the_procrustes_mean_is_the_sum_of_frames_turned_by_scipy() -> None:
    points = versions(5, 3, 0.4, m=12, n=9, r=3)

    def frame(point: LoRAPoint) -> np.ndarray:
        u, s, vh = np.linalg.svd(dense(point).numpy(), full_matrices=False)
        return np.concatenate([u[:, :3], vh[:3].T]) * np.sqrt(s[:3])

    frames = [frame(point) for point in points]
    mean = sum(
        w * y @ scipy.linalg.orthogonal_procrustes(y, frames[0])[0]
        for w, y in zip(WEIGHTS, frames, strict=True)
    ) / math.sqrt(sum(WEIGHTS))
    found = combine(points, WEIGHTS, method="procrustes")
    assert distance(found.point, torch.from_numpy(mean[:12] @ mean[12:].T)) < 1e-11


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_at_the_karcher_mean_the_linked_differences_balance(size: float) -> None:
    points = versions(6, 3, size)
    shares = [0.2, 0.3, 0.5]
    mean = combine(points, shares, method="karcher").point
    b, a = torch.zeros_like(mean.B), torch.zeros_like(mean.A)
    for point, share in zip(points, shares, strict=True):
        moved = point.act(link(mean, point))
        b, a = b + share * (moved.B - mean.B), a + share * (moved.A - mean.A)
    # What is left over is vertical: the update does not move to first order.
    moved = b @ mean.A + mean.B @ a
    assert float(moved.norm() / dense(mean).norm()) < 1e-10


@pytest.mark.parametrize("same", ["columns", "rows", "both", "neither"])
def test_alignment_says_what_two_updates_share(same: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=F64)).Q
    p = torch.linalg.qr(torch.randn(30, 6, generator=generator, dtype=F64)).Q
    first = LoRAPoint(q[:, :3], p[:, :3].mT)
    columns = q[:, :3] if same in ("columns", "both") else q[:, 3:]
    rows = p[:, :3] if same in ("rows", "both") else p[:, 3:]
    second = regauged(LoRAPoint(2.0 * columns, rows.mT), 100.0, generator)
    expected = {"both": 1.0, "neither": 0.0}.get(same, 0.5)
    assert abs(float(alignment(first, second)) - expected) < 1e-10
    assert abs(float(alignment(second, first)) - expected) < 1e-10


@every_mean
def test_unrelated_adapters_are_refused_with_the_reason(method: str) -> None:
    points = Family(30, 20, (4, 4), F64, 10.0, 8).points()
    with pytest.raises(GeometryError, match=r"adapters 1 and 2 are aligned to 0\.\d+") as info:
        combine(points, [0.5, 0.5], method=method)
    assert info.value.hint is not None
    assert '"exact"' in info.value.hint


def test_the_gate_can_be_opened_and_the_cost_is_reported() -> None:
    points = Family(200, 200, (4, 4), F64, 10.0, 8).points()
    found = combine(points, [0.5, 0.5], method="bures", min_alignment=0.0)
    # (B1 + B2)(A1 + A2) / 4 in place of (X1 + X2) / 2: an error of about 1 / sqrt(2)
    assert 0.5 < float(found.deviation) < 0.8


@every_mean
def test_an_update_of_zeros_is_like_none(method: str) -> None:
    (point,) = Family(30, 20, (3,), F64, 1.0, 8).points()
    fresh = LoRAPoint(torch.zeros_like(point.B), point.A)
    with pytest.raises(GeometryError, match="aligned to 0.000"):
        combine([point, fresh], [0.5, 0.5], method=method)


@every_mean
def test_different_ranks_and_negative_weights_are_refused(method: str) -> None:
    points = Family(30, 20, (3, 4), F64, 1.0, 8).points()
    with pytest.raises(GeometryError, match=r"one rank, got ranks \[3, 4\]"):
        combine(points, [0.5, 0.5], method=method)
    with pytest.raises(ConfigError, match="positive weights"):
        combine(points[:1], [-0.5], method=method)


def test_a_karcher_mean_of_rank_deficient_updates_is_refused() -> None:
    (point,) = Family(30, 20, (3,), F64, 1.0, 8).points()
    flat = LoRAPoint(torch.cat([point.B, point.B[:, :1]], 1), torch.cat([point.A, point.A[:1]]))
    with pytest.raises(GeometryError, match="rank-deficient"):
        combine([flat, flat], [0.5, 0.5], method="karcher")
    # ... for which the others have a meaning
    assert distance(combine([flat, flat], [0.5, 0.5], method="bures").point, dense(flat)) < 1e-11
