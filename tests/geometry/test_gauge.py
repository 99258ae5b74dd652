"""Canonical gauges: each keeps the product, and is what it is called, by dense references."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.gauge import GAUGES, GaugeName, to_gauge

F64, F32 = torch.float64, torch.float32
# Section by section of the design: how far a result may be off, relatively, in each dtype.
PRESERVED = {F64: 1e-13, F32: 5e-5}
UNIQUE = {F64: 1e-11, F32: 1e-3}
EXACT = {F64: 1e-12, F32: 1e-5}

dtypes = st.sampled_from([F64, F32])
sides = st.integers(11, 40)
ranks = st.integers(1, 9)
conditions = st.sampled_from([1.0, 20.0, 200.0])
seeds = st.integers(0, 2**31)
batches = st.sampled_from([(), (2,), (2, 3)])


def orthonormal(rows: int, columns: int, batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(*batch, rows, columns, dtype=F64, generator=g)).Q


def random_gauge(rank: int, condition: float, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    """Q1 diag(1 .. 1/condition) Q2 with random rotations, scaled to determinant of modulus 1."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -math.log10(condition), rank, dtype=F64)
    scales = scales / scales.log().mean().exp()
    left, right = orthonormal(rank, rank, batch, g), orthonormal(rank, rank, batch, g)
    return left * scales @ right


def random_point(
    m: int,
    n: int,
    rank: int,
    seed: int,
    *,
    condition: float = 1.0,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = F64,
) -> LoRAPoint:
    """A pair with the singular values 2 .. 1, evenly spaced, in a gauge of that condition."""
    g = torch.Generator().manual_seed(seed)
    s = torch.linspace(2, 1, rank, dtype=F64)
    u, v = orthonormal(m, rank, batch, g), orthonormal(n, rank, batch, g)
    point = LoRAPoint(u * s, v.mT).act(random_gauge(rank, condition, seed + 1, batch))
    return point.to(dtype)


def dense(point: LoRAPoint) -> Tensor:
    """The product of the factors exactly as stored."""
    return point.B.double() @ point.A.double()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error over a batch, in the Frobenius norm."""
    difference = torch.linalg.matrix_norm(found.double() - expected.double())
    return float((difference / torch.linalg.matrix_norm(expected.double())).max())


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, batches, dtypes, st.sampled_from(GAUGES), seeds)
def test_every_gauge_preserves_the_product(
    m: int,
    n: int,
    rank: int,
    condition: float,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    name: GaugeName,
    seed: int,
) -> None:
    point = random_point(m, n, rank, seed, condition=condition, batch=batch, dtype=dtype)
    gauged = to_gauge(point, name)
    assert gauged.point.dtype == dtype
    assert gauged.point.batch_shape == batch
    assert error(dense(gauged.point), dense(point)) < PRESERVED[dtype]
    # The reported G is a change of gauge that leads from the old pair to the new one.
    moved = point.to(F64).act(gauged.G)
    tolerance = condition * PRESERVED[dtype]
    assert error(moved.A, gauged.point.A) < tolerance
    assert error(moved.B, gauged.point.B) < tolerance


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, dtypes, seeds)
def test_svd_gauge_is_balanced_diagonal_and_unique(
    m: int, n: int, rank: int, condition: float, dtype: torch.dtype, seed: int
) -> None:
    point = random_point(m, n, rank, seed, dtype=dtype)
    b, a = (factor.double() for factor in _pair(to_gauge(point, "svd").point))
    s = torch.from_numpy(scipy.linalg.svdvals(dense(point).numpy())[:rank])
    assert error(b.mT @ b, s.diag()) < EXACT[dtype]
    assert error(a @ a.mT, s.diag()) < EXACT[dtype]
    peaks = b.gather(0, b.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    other = to_gauge(point.act(random_gauge(rank, condition, seed + 9)), "svd").point
    assert error(other.B, b) < UNIQUE[dtype]
    assert error(other.A, a) < UNIQUE[dtype]


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, dtypes, st.sampled_from(GAUGES), seeds)
def test_singular_values_are_those_of_the_dense_product_in_every_gauge(
    m: int,
    n: int,
    rank: int,
    condition: float,
    dtype: torch.dtype,
    name: GaugeName,
    seed: int,
) -> None:
    point = random_point(m, n, rank, seed, condition=condition, dtype=dtype)
    s = scipy.linalg.svdvals(dense(point).numpy())[:rank]
    found = to_gauge(point, name).point.singular_values()
    np.testing.assert_allclose(found.numpy(), s, rtol=0, atol=EXACT[dtype] * s[0])


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, dtypes, seeds)
def test_left_gauge_has_orthonormal_columns_and_is_unique(
    m: int, n: int, rank: int, condition: float, dtype: torch.dtype, seed: int
) -> None:
    point = random_point(m, n, rank, seed, dtype=dtype)
    b, a = _pair(to_gauge(point, "left").point)
    assert error(b.double().mT @ b.double(), torch.eye(rank, dtype=F64)) < EXACT[dtype]
    other = to_gauge(point.act(random_gauge(rank, condition, seed + 9)), "left").point
    assert error(other.B, b) < UNIQUE[dtype]
    assert error(other.A, a) < UNIQUE[dtype]


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, dtypes, seeds)
def test_balanced_gauge_is_the_least_of_the_orbit_twice_the_nuclear_norm(
    m: int, n: int, rank: int, condition: float, dtype: torch.dtype, seed: int
) -> None:
    point = random_point(m, n, rank, seed, condition=condition, dtype=dtype)
    balanced = to_gauge(point, "balanced").point
    b, a = (factor.double() for factor in _pair(balanced))
    assert error(b.mT @ b, a @ a.mT) < EXACT[dtype]
    nuclear = scipy.linalg.svdvals(dense(point).numpy())[:rank].sum()
    energy = float(b.square().sum() + a.square().sum())
    assert energy == pytest.approx(2 * nuclear, rel=EXACT[dtype])
    elsewhere = balanced.to(F64).act(random_gauge(rank, 1.5, seed + 2))
    assert float(elsewhere.B.square().sum() + elsewhere.A.square().sum()) >= energy * (1 - 1e-12)


@settings(max_examples=25)
@given(sides, sides, ranks, st.sampled_from([1.0, 20.0]), seeds)
def test_balanced_gauge_is_the_root_of_the_geometric_mean(
    m: int, n: int, rank: int, condition: float, seed: int
) -> None:
    point = random_point(m, n, rank, seed, condition=condition)
    x = np.linalg.inv((point.A @ point.A.mT).numpy())  # (A A^T)^-1
    y = (point.B.mT @ point.B).numpy()
    root = scipy.linalg.sqrtm(x)
    inverse = np.linalg.inv(root)
    mean = root @ scipy.linalg.sqrtm(inverse @ y @ inverse) @ root  # x # y
    expected = torch.from_numpy(np.real(scipy.linalg.sqrtm(mean)))
    found = to_gauge(point, "balanced").G
    assert error(found, expected) < 1e-8
    assert error(found, found.mT) < 1e-11


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, seeds)
def test_balanced_gauge_is_idempotent_and_turns_with_the_pair(
    m: int, n: int, rank: int, condition: float, seed: int
) -> None:
    point = random_point(m, n, rank, seed, condition=condition)
    balanced = to_gauge(point, "balanced").point
    again = to_gauge(balanced, "balanced")
    assert error(again.G, torch.eye(rank, dtype=F64)) < UNIQUE[F64]
    turn = orthonormal(rank, rank, (), torch.Generator().manual_seed(seed + 3))
    turned = to_gauge(point.act(turn), "balanced").point
    assert error(turned.B, balanced.B @ turn.mT) < UNIQUE[F64]
    assert error(turned.A, turn @ balanced.A) < UNIQUE[F64]


@settings(max_examples=25)
@given(sides, sides, ranks, conditions, dtypes, seeds)
def test_pivot_gauge_is_unique_and_stores_rows_of_the_product(
    m: int, n: int, rank: int, condition: float, dtype: torch.dtype, seed: int
) -> None:
    point = random_point(m, n, rank, seed, dtype=dtype)
    gauged = to_gauge(point, "pivot")
    assert gauged.pivots is not None
    rows = gauged.pivots
    assert torch.equal(gauged.point.B[rows], torch.eye(rank, dtype=dtype))
    assert error(gauged.point.A, dense(point)[rows]) < EXACT[dtype]
    # The choice is that of LAPACK's pivoted QR on the dense product's own left vectors.
    u = scipy.linalg.svd(dense(point).numpy())[0][:, :rank]
    assert rows.tolist() == scipy.linalg.qr(u.T, pivoting=True)[2][:rank].tolist()
    moved = point.act(random_gauge(rank, condition, seed + 9))
    for other in (to_gauge(moved, "pivot"), to_gauge(moved, "pivot", pivots=rows)):
        assert other.pivots is not None
        assert torch.equal(other.pivots, rows)
        assert error(other.point.B, gauged.point.B) < UNIQUE[dtype]
        assert error(other.point.A, gauged.point.A) < UNIQUE[dtype]


@pytest.mark.parametrize("name", GAUGES)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_gauge_of_condition_1e5_costs_nothing_but_its_storage(
    name: GaugeName, dtype: torch.dtype
) -> None:
    point = random_point(64, 48, 8, 5, condition=1e5, dtype=dtype)
    assert error(dense(to_gauge(point, name).point), dense(point)) < {F64: 1e-10, F32: 1e-6}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GAUGES)
def test_half_precision_goes_in_and_comes_out(name: GaugeName, dtype: torch.dtype) -> None:
    point = random_point(24, 16, 4, 6, dtype=dtype)
    gauged = to_gauge(point, name).point
    assert gauged.dtype == dtype
    assert error(dense(gauged), dense(point)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", GAUGES)
@pytest.mark.parametrize("shape", [(20, 30), (3, 30), (20, 3)], ids=str)
def test_a_lower_rank_is_gauged_on_its_own_directions(
    name: GaugeName, shape: tuple[int, int]
) -> None:
    m, n = shape
    g = torch.Generator().manual_seed(7)
    b, a = torch.randn(m, 6, generator=g, dtype=F64), torch.randn(6, n, generator=g, dtype=F64)
    a[4:] = a[:2]  # rank 4, or 3 by the shape
    rank = min(4, m, n)
    point = LoRAPoint(b, a)
    gauged = to_gauge(point, name)
    assert error(dense(gauged.point), dense(point)) < 1e-13
    assert error(gauged.G @ a, gauged.point.A) < 1e-12
    assert int(torch.linalg.matrix_rank(gauged.G)) == rank
    empty = gauged.point.B.abs().sum(0) + gauged.point.A.abs().sum(1) == 0
    if name in ("balanced", "equal_energy"):
        assert not bool(empty.any())
        assert error(gauged.point.B.mT @ gauged.point.B, gauged.point.A @ gauged.point.A.mT) < 1e-12
    else:
        assert empty.tolist() == [False] * rank + [True] * (6 - rank)
    if gauged.pivots is not None:
        assert (gauged.pivots[rank:] == -1).all()
        kept = gauged.point.B[gauged.pivots[:rank]]
        assert torch.equal(kept, torch.eye(6, dtype=F64)[:rank])


@pytest.mark.parametrize("name", GAUGES)
def test_an_update_of_zeros_stays_trainable_beside_one_that_is_not(name: GaugeName) -> None:
    g = torch.Generator().manual_seed(8)
    b, a = torch.randn(2, 12, 3, generator=g), torch.randn(2, 3, 10, generator=g)
    b[0] = 0
    point = LoRAPoint(b, a)
    gauged = to_gauge(point, name)
    assert torch.equal(gauged.point.A[0], a[0])
    assert torch.equal(gauged.point.B[0], b[0])
    assert torch.equal(gauged.G[0], torch.eye(3, dtype=F64))
    assert not torch.equal(gauged.point.A[1], a[1])
    assert error(dense(gauged.point)[1], dense(point)[1]) < 1e-6
    if gauged.pivots is not None:
        assert (gauged.pivots[0] == -1).all()


@pytest.mark.parametrize("name", GAUGES)
def test_gradients_pass_through_a_gauge_as_if_it_were_not_there(name: GaugeName) -> None:
    point = random_point(9, 7, 3, 9, condition=20.0)
    b, a = point.B.requires_grad_(), point.A.requires_grad_()
    direction = torch.randn(9, 7, dtype=F64)
    gauged = to_gauge(LoRAPoint(b, a), name).point
    found = torch.autograd.grad(((gauged.B @ gauged.A) * direction).sum(), (b, a))
    expected = torch.autograd.grad(((b @ a) * direction).sum(), (b, a))
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-9


def test_gradients_do_not_see_how_the_equal_energy_rotation_jumps() -> None:
    # One singular value is the mean: the second rotation's angle is a ratio of two roundings.
    point = random_point(9, 7, 3, 9)
    u, _, vh = torch.linalg.svd(dense(point), full_matrices=False)
    s = torch.tensor([2, 1.5, 1], dtype=F64)
    b = (u[:, :3] * s).requires_grad_()
    gauged = to_gauge(LoRAPoint(b, vh[:3]), "equal_energy").point
    direction = torch.randn(9, 7, dtype=F64)
    (found,) = torch.autograd.grad(((gauged.B @ gauged.A) * direction).sum(), b)
    assert error(found, direction @ vh[:3].mT) < 1e-12


def test_the_product_is_never_formed() -> None:
    size = 200_000  # 320 GB
    b, a = torch.zeros(size, 2), torch.zeros(2, size)
    b[3, 0], b[-1, 1], a[0, 5], a[1, -1] = 8.0, 1.0, 0.5, 1.0
    for name in GAUGES:
        gauged = to_gauge(LoRAPoint(b, a), name).point
        assert float(gauged.B[3] @ gauged.A[:, 5]) == pytest.approx(4.0)
        assert float(gauged.B[-1] @ gauged.A[:, -1]) == pytest.approx(1.0)


def test_what_cannot_be_gauged_is_refused() -> None:
    point = random_point(12, 10, 3, 10)
    assert get_args(GaugeName) == GAUGES
    with pytest.raises(ConfigError, match="svd, balanced, equal_energy, left, pivot, got 'qr'"):
        to_gauge(point, "qr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='belong to the gauge "pivot"'):
        to_gauge(point, "svd", pivots=torch.tensor([0, 1, 2]))
    for pivots in (torch.tensor([0, 1]), torch.tensor([0, 1, 12]), torch.rand(3)):
        with pytest.raises(GeometryError, match="whole numbers from 0 to 11"):
            to_gauge(point, "pivot", pivots=pivots)
    with pytest.raises(GeometryError, match="linearly dependent"):
        to_gauge(point, "pivot", pivots=torch.tensor([4, 1, 4]))
    dependent = point.B.clone()
    dependent[5] = 0.3 * dependent[1] - 0.7 * dependent[2]
    with pytest.raises(GeometryError, match="linearly dependent"):
        to_gauge(LoRAPoint(dependent, point.A), "pivot", pivots=torch.tensor([5, 1, 2]))
    with pytest.raises(GeometryError, match="rank below r"):
        to_gauge(LoRAPoint(0 * point.B, point.A), "pivot", pivots=torch.tensor([0, 1, 2]))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        to_gauge(LoRAPoint(point.B * math.nan, point.A), "svd")


def _pair(point: LoRAPoint) -> tuple[Tensor, Tensor]:
    return point.B, point.A
