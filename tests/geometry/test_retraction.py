"""Properties 15, 16, 17 and 48: steps on the matrices of rank r, against pymanopt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from geometry_problems import F64, Problem, dense_differential, error, problems, theorem
from hypothesis import given
from pymanopt.manifolds import FixedRankEmbedded

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import (
    LoRAPoint,
    LoRATangent,
    connection_form,
    horizontal_lift,
    project,
    retract,
    vector_transport,
)

# pymanopt completes the basis of a tangent vector by its normal part, for which 2r must fit.
ROOMY = problems(dtypes=(F64,), ratio=2, batches=((),))


def manifold(problem: Problem) -> FixedRankEmbedded:
    return FixedRankEmbedded(problem.m, problem.n, problem.r)


def svd_triple(point: LoRAPoint) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vh = np.linalg.svd(point.product().numpy(), full_matrices=False)
    r = point.rank
    return u[:, :r], s[:r], vh[:r]


def dense(ambient: tuple[np.ndarray, np.ndarray, np.ndarray]) -> torch.Tensor:
    u, s, v = ambient
    return torch.from_numpy(u @ s @ v.T)


@theorem
@given(ROOMY)
def test_the_tangent_projection_is_that_of_pymanopt(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.point()
    z = draw.normal(problem.m, problem.n)
    triple, space = svd_triple(point), manifold(problem)
    want = dense(space.embedding(triple, space.projection(triple, z.numpy())))
    assert error(project(point, horizontal_lift(point, z)).product(), want) < 1e-12


@theorem
@given(ROOMY)
def test_the_retraction_is_that_of_pymanopt(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point, eta = draw.balanced().act(g), draw.tangent(g)
    triple, space = svd_triple(point), manifold(problem)
    z = dense_differential(point, eta).numpy()
    u, s, vt = space.retraction(triple, space.projection(triple, z))
    got = retract(point, eta)
    assert error(got.product(), torch.from_numpy(u * s @ vt)) < 1e-12
    # The result is balanced, which no gauge of the start changes.
    assert error(got.B.mT @ got.B, got.A @ got.A.mT) < 1e-11


@theorem
@given(ROOMY)
def test_the_vector_transport_is_that_of_pymanopt(problem: Problem) -> None:
    draw = problem.draw()
    g, h = draw.gauge(), draw.gauge()
    start, eta = draw.balanced().act(g), draw.tangent(g)
    end = retract(start, 0.3 * eta).act(h)
    space = manifold(problem)
    first, last = svd_triple(start), svd_triple(end)
    z = dense_differential(start, eta).numpy()
    carried = space.transport(first, last, space.projection(first, z))
    got = vector_transport(start, end, eta)
    assert error(dense_differential(end, got), dense(space.embedding(last, carried))) < 1e-12
    scale = torch.linalg.matrix_norm(torch.linalg.pinv(end.B) @ got.B)
    assert float(torch.linalg.matrix_norm(connection_form(end, got)) / scale) < 1e-10


@theorem
@given(problems())
def test_the_retraction_is_the_best_approximation_of_the_straight_step(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point = draw.balanced().act(g).to(problem.dtype)
    eta = draw.tangent(g)
    straight = point.B.double() @ point.A.double() + dense_differential(point, eta)
    u, s, vh = torch.linalg.svd(straight, full_matrices=False)
    r = problem.r
    got = retract(point, eta)
    assert got.dtype == problem.dtype
    want = (u[..., :r] * s[..., None, :r]) @ vh[..., :r, :]
    assert error(got.B.double() @ got.A.double(), want) < {F64: 1e-11}.get(problem.dtype, 1e-5)


def test_the_tangential_error_of_the_retraction_is_of_third_order() -> None:
    draw = Problem(14, 11, 3, F64, 20.0, seed=6).draw()
    g = draw.gauge()
    point, eta = draw.balanced().act(g), 0.5 * draw.tangent(g)
    x, z = point.product(), dense_differential(point, eta)
    p_u, p_v = point.B @ torch.linalg.pinv(point.B), torch.linalg.pinv(point.A) @ point.A

    def tangential(end: torch.Tensor, t: float) -> float:
        gap = end - x - t * z
        return float(torch.linalg.matrix_norm(p_u @ gap + gap @ p_v - p_u @ gap @ p_v))

    steps = [0.08, 0.04, 0.02, 0.01]
    ours = [tangential(retract(point, t * eta).product(), t) for t in steps]
    naive = [
        tangential(LoRAPoint(point.B + t * eta.B, point.A + t * eta.A).product(), t) for t in steps
    ]
    for orders, want in ((ours, 3.0), (naive, 2.0)):
        for larger, smaller in itertools.pairwise(orders):
            assert abs(np.log2(larger / smaller) - want) < 0.2


def test_retraction_from_zero_is_defined_and_too_high_a_rank_is_not() -> None:
    draw = Problem(9, 7, 3, F64, 1.0, seed=0).draw()
    start, eta = draw.balanced(), draw.tangent()
    before_training = LoRAPoint(0 * start.B, start.A)
    got = retract(before_training, eta)
    assert error(got.product(), eta.B @ start.A) < 1e-13
    tall = LoRAPoint(torch.zeros(4, 5), torch.zeros(5, 6))
    with pytest.raises(GeometryError, match=r"no matrix of shape \(4, 6\) has rank 5"):
        retract(tall, LoRATangent(tall.B, tall.A))


def test_vector_transport_to_a_rank_deficient_point_is_refused() -> None:
    draw = Problem(9, 7, 3, F64, 1.0, seed=0).draw()
    start, eta = draw.balanced(), draw.tangent()
    with pytest.raises(GeometryError, match="horizontal lift is undefined"):
        vector_transport(start, LoRAPoint(0 * start.B, start.A), eta)
