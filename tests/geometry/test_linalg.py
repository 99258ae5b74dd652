"""The algebra of thin factors, against numpy and scipy on the dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from geometry_problems import F32, F64, Draw, Problem, error, numpy_factors, problems, theorem
from hypothesis import given
from hypothesis import strategies as st

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import linalg

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8))


@theorem
@given(SHAPES, st.sampled_from([F64, F32, torch.bfloat16]), st.integers(0, 2**31))
def test_thin_qr_has_orthonormal_columns_and_a_positive_diagonal(shape, dtype, seed) -> None:
    m, batch, r = shape[0], shape[1] % 3 + 1, shape[2]
    x = torch.randn(batch, m, r, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, upper = linalg.thin_qr(x)
    k = min(m, r)
    assert q.shape == (batch, m, k)
    assert upper.shape == (batch, k, r)
    assert q.dtype == upper.dtype == F64
    assert error(q @ upper, x) < 1e-14
    assert error(q.mT @ q, torch.eye(k).expand(batch, k, k)) < 1e-14
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal(dim1=-2, dim2=-1) >= 0).all())


@theorem
@given(SHAPES, st.integers(0, 2**31))
def test_product_svd_is_the_dense_svd(shape, seed) -> None:
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=generator)
    a = torch.randn(r, n, generator=generator)
    u, s, vh = linalg.product_svd(b, a)
    k = min(m, n, r)
    assert (u.shape, s.shape, vh.shape) == ((m, k), (k,), (k, n))
    dense = b.double().numpy() @ a.double().numpy()
    want = np.linalg.svd(dense, compute_uv=False)[:k]
    np.testing.assert_allclose(s.numpy(), want, atol=1e-12 * want[0])
    np.testing.assert_allclose(
        linalg.product_singular_values(b, a).numpy(), want, atol=1e-12 * want[0]
    )
    np.testing.assert_allclose((u * s @ vh).numpy(), dense, atol=1e-12 * want[0])
    assert error(u.mT @ u, torch.eye(k)) < 1e-13
    assert error(vh @ vh.mT, torch.eye(k)) < 1e-13
    peaks = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    assert bool((peaks > 0).all())


@theorem
@given(problems(dtypes=(F64,)))
def test_product_svd_does_not_depend_on_the_gauge(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.balanced()
    moved = point.act(draw.gauge())
    for first, second in zip(
        linalg.product_svd(point.B, point.A), linalg.product_svd(moved.B, moved.A), strict=True
    ):
        assert float((first - second).abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_numerical_rank_counts_what_survives_the_storage(rank: int, dtype: torch.dtype) -> None:
    draw = Draw(Problem(20, 16, 5, dtype, 1.0, seed=0))
    keep = (torch.arange(5) < rank).double()
    # Through a gauge, so that no column is exactly zero.
    b = (draw.normal(20, 5) * keep) @ draw.orthonormal(5, 5)
    s = linalg.product_singular_values(b.to(F32) if dtype == F32 else b, draw.normal(5, 16))
    assert int(linalg.numerical_rank(s, 20, 16, dtype)) == rank


@theorem
@given(problems())
def test_one_sided_inverses_are_the_pseudoinverses(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.point()
    y, z = draw.normal(problem.m, 4), draw.normal(4, problem.n)
    b, a = numpy_factors(point)
    want_left = np.linalg.pinv(b) @ y.numpy()
    want_right = z.numpy() @ np.linalg.pinv(a)
    left, right = linalg.left_inverse_apply(point.B, y), linalg.right_inverse_apply(z, point.A)
    assert error(left, torch.from_numpy(want_left)) < 1e-11
    assert error(right, torch.from_numpy(want_right)) < 1e-11


@theorem
@given(st.integers(1, 8), st.sampled_from([1.0, 1e3, 1e6]), st.integers(0, 2**31))
def test_sqrtm_is_the_principal_root_of_scipy(r: int, spread: float, seed: int) -> None:
    draw = Draw(Problem(r, r, r, F64, 5.0, seed))
    values = torch.logspace(0, np.log10(spread), r, dtype=F64)
    g = draw.gauge()
    x = torch.stack([g @ torch.diag(values) @ torch.linalg.inv(g), torch.eye(r, dtype=F64)])
    # A rotation by less than 180 degrees has complex eigenvalues.
    skew = draw.normal(r, r)
    x = torch.cat([x, torch.linalg.matrix_exp(0.3 * (skew - skew.mT)).unsqueeze(0)])
    root = linalg.sqrtm(x)
    for got, matrix in zip(root, x, strict=True):
        want = torch.from_numpy(scipy.linalg.sqrtm(matrix.numpy()).real)
        assert error(got @ got, matrix) < 1e-11
        assert error(got, want) < 1e-9


@pytest.mark.parametrize(
    "matrix",
    [-torch.eye(2), torch.zeros(3, 3), torch.diag(torch.tensor([1.0, -1.0]))],
    ids=["negative", "zero", "indefinite"],
)
def test_sqrtm_refuses_a_matrix_without_a_principal_root(matrix: torch.Tensor) -> None:
    with pytest.raises(GeometryError, match="no principal square root"):
        linalg.sqrtm(matrix)


@theorem
@given(st.integers(1, 8), st.sampled_from([0.5, -0.5, 2.0, -1.0]), st.integers(0, 2**31))
def test_sym_pow_is_the_power_of_scipy(r: int, power: float, seed: int) -> None:
    draw = Draw(Problem(r, r, r, F64, 50.0, seed))
    g = draw.gauge()
    p = g @ g.mT
    want = scipy.linalg.fractional_matrix_power(p.numpy(), power)
    assert error(linalg.sym_pow(p, power), torch.from_numpy(want.real)) < 1e-10


def test_sym_pow_refuses_an_indefinite_matrix() -> None:
    with pytest.raises(GeometryError, match="not positive definite"):
        linalg.sym_pow(torch.diag(torch.tensor([1.0, -1.0])), 0.5)
