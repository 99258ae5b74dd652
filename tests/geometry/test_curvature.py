"""Property 18: the curvature against derivatives of the connection, and against small loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from geometry_problems import F64, Problem, error, problems, theorem
from hypothesis import given
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import (
    LoRAPoint,
    LoRATangent,
    connection_form,
    curvature,
    holonomy,
    horizontal,
    project,
    vertical,
)


def derivative(point: LoRAPoint, along: LoRATangent, of: LoRATangent) -> Tensor:
    """Central difference of omega(of) along a vector; both are constant in (B, A)."""
    h = 1e-5
    ahead, behind = (
        connection_form(LoRAPoint(point.B + t * along.B, point.A + t * along.A), of)
        for t in (h, -h)
    )
    return (ahead - behind) / (2 * h)


@theorem
@given(problems(dtypes=(F64,), min_rank=2, batches=((), (2,))))
def test_curvature_is_d_omega_minus_the_bracket(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    start, eta, xi = draw.balanced(), draw.tangent(), draw.tangent()
    first, second = connection_form(start, eta), connection_form(start, xi)
    want = derivative(start, eta, xi) - derivative(start, xi, eta)
    want = want - (first @ second - second @ first)
    omega = curvature(start, eta, xi)
    assert error(omega, want) < 1e-7
    size = torch.linalg.matrix_norm(omega)
    assert float((omega.diagonal(dim1=-2, dim2=-1).sum(-1).abs() / size).max()) < 1e-12
    # In another gauge, in another order, and with vertical parts added.
    moved = curvature(start.act(g), eta.act(g), xi.act(g))
    conjugate = g @ omega @ torch.linalg.inv(g)
    assert error(moved, conjugate, conjugate) < 1e-9
    assert error(curvature(start, xi, eta), -omega) < 1e-12
    lifted = curvature(
        start, eta + vertical(start, draw.normal(problem.r, problem.r)), horizontal(start, xi)
    )
    assert error(lifted, omega) < 1e-10


@theorem
@given(problems(max_rank=1))
def test_curvature_vanishes_for_rank_one(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.point()
    assert not curvature(point, draw.tangent(), draw.tangent()).any()


def truncated(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = np.linalg.svd(x.numpy(), full_matrices=False)
    return torch.from_numpy(u[:, :rank] * s[:rank]), torch.from_numpy(vh[:rank])


def test_a_small_loop_turns_the_frame_by_its_area_times_the_curvature() -> None:
    problem = Problem(9, 8, 3, F64, 20.0, seed=5)
    draw = problem.draw()
    point = draw.balanced()
    eta, xi = (0.3 * horizontal(point, draw.tangent()) for _ in range(2))
    z, y = project(point, eta).product(), project(point, xi).product()
    x = point.product()
    omega = curvature(point, eta, xi)
    eye = torch.eye(3, dtype=F64)
    errors = []
    steps = 8
    for epsilon in (0.1, 0.05, 0.025):
        sides = [(k / steps, 0.0) for k in range(steps)]
        sides += [(1.0, k / steps) for k in range(steps)]
        sides += [(1 - k / steps, 1.0) for k in range(steps)]
        sides += [(0.0, 1 - k / steps) for k in range(steps)]
        # Every node is factorized on its own and put into a gauge of its own.
        loop = [
            LoRAPoint(*truncated(x + epsilon * (s * z + t * y), 3)).act(draw.gauge())
            for s, t in sides[1:]
        ]
        turn = holonomy([point, *loop])
        errors.append(error((eye - turn) / epsilon**2, omega))
    assert errors[0] < 0.1
    for larger, smaller in itertools.pairwise(errors):
        assert 1.7 < larger / smaller < 2.3


def test_curvature_is_refused_at_a_rank_deficient_point() -> None:
    draw = Problem(8, 9, 3, F64, 1.0, seed=0).draw()
    point = LoRAPoint(0 * draw.balanced().B, draw.balanced().A)
    with pytest.raises(GeometryError, match="The curvature is undefined"):
        curvature(point, draw.tangent(), draw.tangent())
