"""Properties 32 to 34: distances and angles, against the dense matrices and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from geometry_problems import F32, F64, Problem, error, problems, theorem
from hypothesis import given
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import (
    LoRAPoint,
    bures_wasserstein_distance,
    frobenius_distance,
    principal_angles,
    procrustes_alignment,
    procrustes_distance,
)

EXACT = {F64: 1e-12, F32: 1e-5}
SELF = {F64: 1e-11, F32: 1e-3}


def dense(point: LoRAPoint) -> Tensor:
    return point.B.double() @ point.A.double()


@theorem
@given(problems())
def test_the_frobenius_distance_is_that_of_the_dense_products(problem: Problem) -> None:
    draw = problem.draw()
    first, second = draw.point(), draw.point()
    # Of another rank, and another sign.
    third = LoRAPoint(
        torch.cat([second.B, -first.B[..., :1]], -1), torch.cat([second.A, first.A[..., :1, :]], -2)
    )
    for other in (LoRAPoint(-2.0 * second.B, second.A), third):
        got = frobenius_distance(first, other)
        assert got.dtype == F64
        want = torch.linalg.matrix_norm(dense(first) - dense(other))
        scale = torch.linalg.matrix_norm(dense(first)) + torch.linalg.matrix_norm(dense(other))
        assert float(((got - want).abs() / scale).max()) < EXACT[problem.dtype]


@theorem
@given(problems())
def test_the_distance_of_an_update_to_itself_in_another_gauge_is_rounding(
    problem: Problem,
) -> None:
    draw = problem.draw()
    point = draw.balanced()
    moved = point.act(draw.gauge()).to(problem.dtype)
    point = point.to(problem.dtype)
    size = torch.linalg.matrix_norm(dense(point))
    assert float((frobenius_distance(point, moved) / size).max()) < SELF[problem.dtype]


def polar_blocks(point: LoRAPoint) -> np.ndarray:
    """[[(XXᵀ)^½, X], [Xᵀ, (XᵀX)^½]] of the dense X."""
    x = dense(point).numpy()
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return np.block([[(u * s) @ u.T, x], [x.T, (vh.T * s) @ vh]])


@theorem
@given(problems(dtypes=(F64,), batches=((),)))
def test_the_procrustes_distance_is_the_bures_wasserstein_distance(problem: Problem) -> None:
    draw = problem.draw()
    first, second = draw.point(), draw.point()
    p, q = polar_blocks(first), polar_blocks(second)
    values, vectors = np.linalg.eigh(p)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    fidelity = np.sqrt(np.linalg.eigvalsh(root @ q @ root).clip(0)).sum()
    want = np.sqrt(max(np.trace(p) + np.trace(q) - 2 * fidelity, 0.0))
    scale = np.sqrt(np.trace(p) + np.trace(q))
    assert abs(float(bures_wasserstein_distance(first, second)) - want) < 1e-6 * scale
    # Symmetric, and the same in every gauge.
    got = procrustes_distance(first, second)
    moved = procrustes_distance(second.act(draw.gauge()), first.act(draw.gauge()))
    assert abs(float(got - moved)) < 1e-11 * scale
    assert float(procrustes_distance(first, first.act(draw.gauge()))) < 1e-11 * scale


def test_the_procrustes_distance_takes_any_ranks_and_batches() -> None:
    draw = Problem(9, 8, 4, F64, 20.0, seed=1, batch=(2,)).draw()
    first = draw.point()
    low = LoRAPoint(first.B[..., :2], first.A[..., :2, :])
    nothing = LoRAPoint(torch.zeros_like(first.B), first.A)
    got = procrustes_distance(first, low)
    assert got.shape == (2,)
    padded = LoRAPoint(torch.nn.functional.pad(low.B, (0, 2)), first.A)
    assert float((procrustes_distance(first, padded) - got).abs().max()) < 1e-12
    assert float((procrustes_distance(low, first) - got).abs().max()) < 1e-12
    # From zero: the square root of twice the nuclear norm.
    want = (2 * torch.linalg.svdvals(dense(first)).sum(-1)).sqrt()
    assert float((procrustes_distance(first, nothing) - want).abs().max()) < 1e-12


@theorem
@given(problems(dtypes=(F64,), batches=((),)))
def test_the_alignment_is_the_orthogonal_procrustes_solution_of_scipy(problem: Problem) -> None:
    draw = problem.draw()
    first, second = draw.balanced(), draw.balanced()
    q = procrustes_alignment(first, second)
    stacks = [np.concatenate([p.B.numpy(), p.A.numpy().T]) for p in (first, second)]
    want, _ = scipy.linalg.orthogonal_procrustes(stacks[1], stacks[0])
    assert error(q.mT @ q, torch.eye(problem.r)) < 1e-13
    best = np.linalg.norm(stacks[1] @ want - stacks[0])
    aligned = second.act(q.mT)
    got = np.hypot(
        np.linalg.norm((aligned.B - first.B).numpy()), np.linalg.norm((aligned.A - first.A).numpy())
    )
    assert abs(got - best) < 1e-12 * np.linalg.norm(stacks[0])
    assert abs(float(procrustes_distance(first, second)) - best) < 1e-11 * np.linalg.norm(stacks[0])


@theorem
@given(problems(dtypes=(F64,), batches=((),)))
def test_principal_angles_are_those_of_scipy(problem: Problem) -> None:
    draw = problem.draw()
    first = draw.point()
    for second in (draw.point(), draw.near(first, 1e-6)):
        x, y = dense(first).numpy(), dense(second).numpy()
        bases = [np.linalg.svd(matrix, full_matrices=False) for matrix in (x, y)]
        r = problem.r
        columns = scipy.linalg.subspace_angles(bases[0][0][:, :r], bases[1][0][:, :r])
        rows = scipy.linalg.subspace_angles(bases[0][2][:r].T, bases[1][2][:r].T)
        for ours, theirs in zip(principal_angles(first, second), (columns, rows), strict=True):
            # Where some angles are below 45 degrees and some above, scipy 1.17 exchanges sine and
            # cosine, and its small angles are good to the root of the rounding only.
            small = theirs < np.pi / 4
            mixed = bool(small.any() and not small.all())
            np.testing.assert_allclose(ours.numpy(), theirs[::-1], atol=5e-8 if mixed else 1e-10)


def test_principal_angles_see_angles_that_cosines_do_not() -> None:
    tiny = 1e-9
    first = LoRAPoint(torch.tensor([[1.0], [0.0]], dtype=F64), torch.ones(1, 3, dtype=F64))
    second = LoRAPoint(torch.tensor([[1.0], [tiny]], dtype=F64), torch.ones(1, 3, dtype=F64))
    columns, rows = principal_angles(first, second)
    assert abs(float(columns) - tiny) < 1e-15
    assert float(rows) < 1e-15


def test_principal_angles_are_of_the_numerical_rank() -> None:
    draw = Problem(12, 10, 4, F32, 1.0, seed=2).draw()
    first, second = draw.point(), draw.point()
    thin = LoRAPoint(second.B[:, :2], second.A[:2])
    mixed = LoRAPoint(torch.cat([thin.B, thin.B], -1), 0.5 * torch.cat([thin.A, thin.A], -2))
    for got, want in zip(
        principal_angles(first, mixed), principal_angles(thin, first), strict=True
    ):
        assert got.shape == (2,)
        assert float((got - want).abs().max()) < 1e-6
    batch = LoRAPoint(torch.stack([second.B, mixed.B]), torch.stack([second.A, mixed.A]))
    with pytest.raises(GeometryError, match="varies within a batch, from 2 to 4"):
        principal_angles(batch, batch)
    zero = LoRAPoint(torch.zeros(12, 4), second.A)
    assert principal_angles(first, zero)[0].shape == (0,)


def test_updates_of_two_shapes_are_refused() -> None:
    first = LoRAPoint(torch.ones(4, 2), torch.ones(2, 3))
    other = LoRAPoint(torch.ones(5, 2), torch.ones(2, 3))
    for call in (frobenius_distance, procrustes_distance, procrustes_alignment, principal_angles):
        with pytest.raises(GeometryError, match="need one shape"):
            call(first, other)
    with pytest.raises(GeometryError, match="pairs of one rank, got 2 and 1"):
        procrustes_alignment(first, LoRAPoint(first.B[:, :1], first.A[:1]))
