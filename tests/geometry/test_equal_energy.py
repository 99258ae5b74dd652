"""The equal-energy gauge: equal norms, the least quantisation factor, and what rounding costs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.equal_energy import equal_energy_rotation, quantisation_factor
from gauge_ext.geometry.gauge import to_gauge

F64, F32 = torch.float64, torch.float32
EXACT = {F64: 1e-12, F32: 1e-5}


def random_point(m: int, n: int, rank: int, seed: int) -> LoRAPoint:
    """Normal factors, the rows of A scaled apart so that the spectrum decays."""
    g = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, rank + 1, dtype=F64).unsqueeze(-1)
    b = torch.randn(m, rank, generator=g, dtype=F64)
    return LoRAPoint(b, torch.randn(rank, n, generator=g, dtype=F64) / decay)


def nuclear_norm(point: LoRAPoint) -> float:
    return float(scipy.linalg.svdvals((point.B.double() @ point.A.double()).numpy()).sum())


def energies(point: LoRAPoint) -> tuple[Tensor, Tensor]:
    return point.B.double().square().sum(-2), point.A.double().square().sum(-1)


@settings(max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 16),
    st.sampled_from([F64, F32]),
    st.integers(0, 2**31),
)
def test_all_rank_one_parts_have_equal_energy_and_the_factor_is_one(
    m: int, n: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    point = random_point(m, n, rank, seed).to(dtype)
    equal = to_gauge(point, "equal_energy").point
    columns, rows = energies(equal)
    share = nuclear_norm(point) / rank
    for found in (columns, rows):
        np.testing.assert_allclose(found.numpy(), share, rtol=EXACT[dtype])
    functional = float((columns * rows).sum())
    assert functional == pytest.approx(nuclear_norm(point) ** 2 / rank, rel=EXACT[dtype])
    assert float(quantisation_factor(equal)) == pytest.approx(1.0, rel=EXACT[dtype])


@settings(max_examples=30)
@given(
    st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=24),
    st.integers(1, 3),
)
@example([1.0] * 7, 1)
@example([0.0] * 5, 2)
@example([1.0, 0.0, 0.0], 2)
def test_the_rotation_is_orthogonal_and_makes_the_diagonal_constant(
    values: list[float], batch: int
) -> None:
    s = torch.tensor(values, dtype=F64)
    # Each batch entry another spectrum, so that the rotations differ.
    spectra = torch.stack([s.roll(shift) * (shift + 1) for shift in range(batch)])
    q = equal_energy_rotation(spectra)
    eye = torch.eye(len(values), dtype=F64).expand_as(q)
    torch.testing.assert_close(q @ q.mT, eye, rtol=0, atol=1e-13)
    diagonal = (q @ torch.diag_embed(spectra) @ q.mT).diagonal(dim1=-2, dim2=-1)
    mean = spectra.mean(-1, keepdim=True).expand_as(diagonal)
    torch.testing.assert_close(diagonal, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_no_search_over_the_whole_group_beats_the_equal_energy_gauge(rank: int, seed: int) -> None:
    point = random_point(9, 11, rank, seed)
    bound = nuclear_norm(point) ** 2 / rank

    def energy(flat: np.ndarray) -> tuple[float, np.ndarray]:
        gauge = torch.tensor(flat, dtype=F64).reshape(rank, rank).requires_grad_()
        rows = (gauge @ point.A).square().sum(-1)
        columns = (point.B @ torch.linalg.inv(gauge)).square().sum(-2)
        value = (rows * columns).sum() / bound
        value.backward()
        assert gauge.grad is not None
        return float(value.detach()), gauge.grad.flatten().numpy()

    draws = np.random.default_rng(seed)
    found = []
    for _ in range(4):
        start = np.eye(rank).ravel() + 0.3 * draws.standard_normal(rank * rank)
        result = scipy.optimize.minimize(
            energy, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-16}
        )
        found.append(result.fun)
    assert min(found) >= 1 - 1e-9
    assert min(found) == pytest.approx(1.0, abs=1e-6)  # and the search did get there


def test_the_factor_of_the_svd_gauge_is_frobenius_against_nuclear_norm() -> None:
    point = random_point(20, 30, 6, 3)
    s = scipy.linalg.svdvals((point.B @ point.A).numpy())[:6]
    expected = 6 * (s**2).sum() / s.sum() ** 2
    assert float(quantisation_factor(to_gauge(point, "svd").point)) == pytest.approx(expected)
    assert float(quantisation_factor(point)) > 1


def test_rounding_to_bfloat16_costs_what_the_factor_says() -> None:
    # Spectrum 1/k², the case in which the gauges differ most.
    g = torch.Generator().manual_seed(4)
    rank = 16
    s = 1.0 / torch.arange(1, rank + 1, dtype=F64) ** 2
    u = torch.linalg.qr(torch.randn(200, rank, generator=g, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(160, rank, generator=g, dtype=F64)).Q
    svd = to_gauge(LoRAPoint(u * s, v.mT), "svd").point
    equal = to_gauge(svd, "equal_energy").point

    def cost(point: LoRAPoint) -> float:
        rounded = point.to(torch.bfloat16)
        return float((rounded.B.double() @ rounded.A.double() - (u * s) @ v.mT).norm())

    predicted = float((quantisation_factor(svd) / quantisation_factor(equal)).sqrt())
    assert predicted == pytest.approx(float((rank * s.square().sum()).sqrt() / s.sum()), rel=1e-9)
    assert predicted > 2
    assert cost(svd) / cost(equal) == pytest.approx(predicted, rel=0.15)


def test_the_factor_of_nothing_is_one_and_of_cancelling_parts_infinite() -> None:
    b, a = torch.tensor([[1.0, -1.0]]).expand(3, 2), torch.ones(2, 4)
    assert float(quantisation_factor(LoRAPoint(b, a))) > 1e10
    assert float(quantisation_factor(LoRAPoint(0 * b, a))) == 1.0
    batch = LoRAPoint(torch.stack([0 * b, b * torch.tensor([1.0, 0.0])]), torch.stack([a, a]))
    assert quantisation_factor(batch).tolist() == pytest.approx([1.0, 2.0])
