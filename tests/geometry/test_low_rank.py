"""The nearest update of low rank, against the whole SVD of the whole matrix."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import low_rank
from gauge_ext.geometry.low_rank import RowBlocks, input_factor, nearest_low_rank

SIDES = st.integers(1, 48)
SEEDS = st.integers(0, 2**16)


def matrix(m: int, n: int, seed: int, *, decay: float = 0.0) -> Tensor:
    """A random matrix with singular values 1 / k^decay."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return torch.matmul(u / torch.arange(1, k + 1).pow(decay), v.mT)


def tail(d: Tensor, rank: int) -> float:
    """||D - D_r|| / ||D|| for the truncated SVD, by Eckart and Young the least there is."""
    s = torch.linalg.svdvals(d)
    return float(torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s))


@settings(max_examples=20)
@given(SIDES, SIDES, st.integers(1, 16), st.sampled_from([0.0, 0.5, 1.0, 2.0]), SEEDS)
def test_the_error_is_within_a_percent_of_the_optimum(
    m: int, n: int, rank: int, decay: float, seed: int
) -> None:
    d = matrix(m, n, seed, decay=decay)
    found = nearest_low_rank(d, rank, seed=seed)
    assert found is not None
    error = float(torch.linalg.matrix_norm(d - found.point.product()) / torch.linalg.matrix_norm(d))
    assert error <= 1.01 * tail(d, rank) + 1e-7


@settings(max_examples=20)
@given(SIDES, SIDES, st.integers(1, 16), SEEDS)
def test_unexplained_is_the_squared_relative_error(m: int, n: int, rank: int, seed: int) -> None:
    d = matrix(m, n, seed, decay=0.5)
    found = nearest_low_rank(d, rank)
    assert found is not None
    x = found.point.product()
    expected = (d - x).square().sum() / d.square().sum()
    assert found.unexplained == pytest.approx(float(expected), abs=1e-12)
    assert found.unexplained == found.unexplained_plain
    pythagoras = 1 - float(x.square().sum() / d.square().sum())
    assert found.unexplained == pytest.approx(pythagoras, abs=1e-12)


@settings(max_examples=20)
@given(SIDES, SIDES, st.integers(1, 8), SEEDS)
def test_a_matrix_of_low_rank_comes_back_exactly_and_balanced(
    m: int, n: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(m, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, n, generator=generator, dtype=torch.float64
    )
    found = nearest_low_rank(d, 16)
    assert found is not None
    assert found.point.rank == min(m, n, rank)
    torch.testing.assert_close(found.point.product(), d, rtol=0, atol=1e-12 * float(d.norm()))
    b, a = found.point.B, found.point.A
    sigma = torch.diag(torch.linalg.svdvals(d)[: found.point.rank])
    torch.testing.assert_close(b.mT @ b, sigma, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a @ a.mT, sigma, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(SIDES, SIDES, st.floats(0.05, 0.999), SEEDS)
def test_the_energy_decides_the_rank(m: int, n: int, energy: float, seed: int) -> None:
    d = matrix(m, n, seed, decay=1.0)
    found = nearest_low_rank(d, energy=energy)
    assert found is not None
    assert found.unexplained <= 1 - energy + 1e-12
    # One direction fewer would not do.
    s = torch.linalg.svdvals(d).square()
    assert float(s[: found.point.rank - 1].sum() / s.sum()) < energy + 1e-3


def test_the_rank_limits_the_energy() -> None:
    d = matrix(40, 30, 1)
    found = nearest_low_rank(d, 5, energy=0.9)
    assert found is not None
    assert found.point.rank == 5
    found = nearest_low_rank(matrix(40, 30, 1, decay=2.0), 5, energy=0.8)
    assert found is not None
    assert found.point.rank == 1


@settings(max_examples=20)
@given(SIDES, SIDES, st.integers(1, 8), st.integers(1, 60), SEEDS)
def test_the_input_weighted_update_is_the_optimum_of_the_output_error(
    m: int, n: int, rank: int, samples: int, seed: int
) -> None:
    d = matrix(m, n, seed, decay=0.5)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(0, -2, n, dtype=torch.float64)
    factor = input_factor(activations=inputs)
    found = nearest_low_rank(d, rank, factor=factor)
    plain = nearest_low_rank(d, rank)
    assert found is not None
    assert plain is not None
    # The outputs' error by definition, and its optimum by the SVD of the weighted matrix.
    square = inputs.mT @ inputs / samples
    square += 1e-6 * square.trace() / n * torch.eye(n)
    values, vectors = torch.linalg.eigh(square)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    weighted = d @ root
    error = float(torch.linalg.matrix_norm((d - found.point.product()) @ root))
    norm = float(torch.linalg.matrix_norm(weighted))
    assert error <= (1.01 * tail(weighted, rank) + 1e-6) * norm
    assert found.unexplained == pytest.approx((error / norm) ** 2, abs=1e-9)
    other = float(torch.linalg.matrix_norm((d - plain.point.product()) @ root))
    assert error <= 1.01 * other + 1e-9 * norm
    residual = (d - found.point.product()).square().sum() / d.square().sum()
    assert found.unexplained_plain == pytest.approx(float(residual), rel=1e-9, abs=1e-12)


def test_weights_beat_the_plain_update_where_inputs_are_uneven() -> None:
    d = matrix(40, 30, 3)
    inputs = torch.randn(200, 30, dtype=torch.float64) * torch.logspace(0, -3, 30)
    found = nearest_low_rank(d, 4, factor=input_factor(activations=inputs))
    plain = nearest_low_rank(d, 4)
    assert found is not None
    assert plain is not None

    def error(x: Tensor) -> float:
        return float(((d - x) @ inputs.mT).norm() / (d @ inputs.mT).norm())

    assert error(found.point.product()) < 0.8 * error(plain.point.product())


def test_activations_and_their_covariance_weigh_alike() -> None:
    inputs = torch.randn(2, 50, 7, dtype=torch.float64)
    rows = inputs.reshape(-1, 7)
    torch.testing.assert_close(
        input_factor(activations=inputs), input_factor(covariance=rows.mT @ rows / 100)
    )


@settings(max_examples=20)
@given(SIDES, SIDES, SEEDS)
def test_reading_by_blocks_changes_nothing(m: int, n: int, seed: int) -> None:
    d = matrix(m, n, seed, decay=1.0)  # a flat spectrum has no one nearest matrix
    calls: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> Tensor:
        calls.append((start, stop))
        return d[start:stop]

    whole = nearest_low_rank(d, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "_BLOCK_BYTES", 8 * n * 5)
        parts = nearest_low_rank(RowBlocks((m, n), read), 4)
    assert max(stop - start for start, stop in calls) <= 5
    assert whole is not None
    assert parts is not None
    torch.testing.assert_close(parts.point.product(), whole.point.product())


def test_any_float_dtype_is_read_in_float64() -> None:
    d = matrix(20, 20, 0).to(torch.bfloat16)
    found = nearest_low_rank(d, 20)
    assert found is not None
    assert found.point.dtype == torch.float64
    torch.testing.assert_close(found.point.product(), d.double())


def test_the_seed_makes_it_repeatable() -> None:
    d = matrix(40, 40, 0)
    first, second = (nearest_low_rank(d, 3, seed=5) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.point.B, second.point.B)


def test_nothing_is_near_zero() -> None:
    assert nearest_low_rank(torch.zeros(5, 4), 2) is None


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "rank, an energy"),
        ({"rank": 0}, "rank must"),
        ({"rank": True}, "rank must"),
        ({"energy": 0.0}, "energy must"),
        ({"energy": 1.5}, "energy must"),
        ({"rank": 1, "oversampling": -1}, "oversampling must"),
        ({"rank": 1, "power_iterations": -1}, "power_iterations must"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nearest_low_rank(torch.ones(3, 3), **kwargs)


def test_what_is_not_finite_is_refused() -> None:
    d = torch.ones(3, 3)
    d[1, 1] = math.nan
    with pytest.raises(NonFiniteError):
        nearest_low_rank(d, 1)
    with pytest.raises(NonFiniteError):
        input_factor(activations=d)


def test_inputs_that_cannot_weigh_are_refused() -> None:
    for wrong in (torch.ones(3, 4), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), -torch.eye(3)):
        with pytest.raises(GeometryError):
            input_factor(covariance=wrong)
    with pytest.raises(GeometryError, match="positive semidefinite"):
        input_factor(covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(GeometryError, match="all zero"):
        input_factor(activations=torch.zeros(4, 3))
    with pytest.raises(ConfigError):
        input_factor()
    with pytest.raises(ConfigError):
        input_factor(activations=torch.ones(2, 2), damping=0.0)
    with pytest.raises(GeometryError, match="shape"):
        nearest_low_rank(torch.ones(3, 4), 1, factor=torch.eye(3))


def test_more_power_is_never_worse_on_a_flat_spectrum() -> None:
    d = matrix(60, 60, 2, decay=0.1)
    found = [nearest_low_rank(d, 8, power_iterations=q) for q in (0, 1, 3, 6)]
    errors = [x.unexplained for x in found if x is not None]
    assert all(later <= earlier for earlier, later in pairwise(errors))
