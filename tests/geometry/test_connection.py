"""Properties 4 to 10 and 37: vertical and horizontal vectors, against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_problems import (
    F32,
    F64,
    Problem,
    dense_differential,
    dense_metric,
    error,
    numpy_factors,
    problems,
    theorem,
)
from hypothesis import given
from hypothesis import strategies as st

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import (
    LoRAPoint,
    LoRATangent,
    connection_form,
    horizontal,
    horizontal_lift,
    project,
    vertical,
)

EXACT = {F64: 1e-12, F32: 1e-5}
EQUIVARIANCE = {F64: 1e-11, F32: 2e-3}
ORTHOGONAL = {F64: 1e-12, F32: 1e-4}

WEIGHTS = st.sampled_from([0.5, 0.1, 16 / 17, 1.0])


@theorem
@given(problems(), WEIGHTS)
def test_the_connection_form_reads_the_generator_off_a_vertical_vector(
    problem: Problem, weight: float
) -> None:
    draw = problem.draw()
    point = draw.point()
    generator = draw.normal(problem.r, problem.r).to(problem.dtype)
    omega = connection_form(point, vertical(point, generator), weight)
    assert omega.dtype == problem.dtype
    assert error(omega, generator) < EXACT[problem.dtype]


@theorem
@given(problems(), WEIGHTS)
def test_the_connection_form_is_equivariant(problem: Problem, weight: float) -> None:
    draw = problem.draw()
    point, eta, g = draw.balanced().to(problem.dtype), draw.tangent(), draw.gauge()
    moved = connection_form(point.act(g), eta.act(g), weight)
    want = g @ connection_form(point, eta, weight).to(F64) @ torch.linalg.inv(g)
    scale = torch.linalg.matrix_norm(connection_form(point, eta, weight).to(F64))
    # || G w G^-1 || <= cond(G) ||w||: what equivariance can be measured by.
    gap = torch.linalg.matrix_norm(moved.to(F64) - want) / (scale * problem.condition)
    assert float(gap.max()) < EQUIVARIANCE[problem.dtype]


@theorem
@given(problems())
def test_vertical_and_horizontal_parts_are_orthogonal_and_add_up(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point = draw.balanced().act(g).to(problem.dtype)
    eta = draw.tangent(g)
    v, h = vertical(point, connection_form(point, eta)), horizontal(point, eta)
    lengths = (dense_metric(point, v, v) * dense_metric(point, h, h)).sqrt()
    assert float((dense_metric(point, v, h).abs() / lengths).max()) < ORTHOGONAL[problem.dtype]
    assert error((v + h).B, eta.B) < ORTHOGONAL[problem.dtype]
    assert error((v + h).A, eta.A) < ORTHOGONAL[problem.dtype]
    other = vertical(point, (g @ draw.normal(problem.r, problem.r) @ torch.linalg.inv(g)))
    other = other.to(problem.dtype)
    lengths = (dense_metric(point, other, other) * dense_metric(point, h, h)).sqrt()
    assert float((dense_metric(point, other, h).abs() / lengths).max()) < ORTHOGONAL[problem.dtype]


@theorem
@given(problems(dtypes=(F64,), max_rank=4, batches=((),)))
def test_the_connection_form_is_the_orthogonal_projection_onto_the_vertical_space(
    problem: Problem,
) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point, eta = draw.balanced().act(g), draw.tangent(g)
    b, a = numpy_factors(point)
    # The metric is the Euclidean one of the stacked (eta_B A, B eta_A).
    columns = []
    for index in range(problem.r**2):
        unit = np.zeros(problem.r**2)
        unit[index] = 1.0
        generator = unit.reshape(problem.r, problem.r)
        columns.append(np.concatenate([(-b @ generator @ a).ravel(), (b @ generator @ a).ravel()]))
    stacked = np.concatenate([(eta.B.numpy() @ a).ravel(), (b @ eta.A.numpy()).ravel()])
    basis = np.stack(columns, -1)
    solution = np.linalg.lstsq(basis, stacked, rcond=None)[0]
    want = torch.from_numpy(solution.reshape(problem.r, problem.r))
    assert error(connection_form(point, eta), want) < 1e-9


@theorem
@given(problems())
def test_the_differential_undoes_the_horizontal_lift(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point = draw.balanced().act(g).to(problem.dtype)
    eta = draw.tangent(g)
    z = dense_differential(point, eta)
    for lift in (horizontal_lift(point, z), horizontal_lift(point, project(point, eta))):
        assert lift.dtype == problem.dtype
        assert error(dense_differential(point, lift), z) < EXACT[problem.dtype]
    assert error(project(point, lift).product(), z) < EXACT[problem.dtype]


@theorem
@given(problems())
def test_lifts_are_horizontal_and_the_lift_of_a_projection_is_the_horizontal_part(
    problem: Problem,
) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point = draw.balanced().act(g).to(problem.dtype)
    eta = draw.tangent(g)
    lift = horizontal_lift(point, project(point, eta))
    of_a = lift.A.double() @ torch.linalg.pinv(point.A.double())
    of_b = torch.linalg.pinv(point.B.double()) @ lift.B.double()
    tolerance = EXACT[problem.dtype]
    assert error(of_a, of_b) < tolerance
    part = horizontal(point, eta)
    assert error(lift.B, part.B) < tolerance
    assert error(lift.A, part.A) < tolerance


@theorem
@given(problems())
def test_vertical_vectors_leave_the_product_alone(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.point()
    v = vertical(point, draw.normal(problem.r, problem.r))
    size = dense_metric(point, v, v).sqrt()
    for z in (dense_differential(point, v), project(point, v).to(F64).product()):
        assert float((torch.linalg.matrix_norm(z) / size).max()) < EXACT[problem.dtype]


@theorem
@given(problems(dtypes=(F64,)))
def test_the_lift_of_any_matrix_is_that_of_its_tangent_part(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.point()
    z = draw.normal(problem.m, problem.n)
    p_u = point.B @ torch.linalg.pinv(point.B)
    p_v = torch.linalg.pinv(point.A) @ point.A
    want = p_u @ z + z @ p_v - p_u @ z @ p_v
    assert error(project(point, horizontal_lift(point, z)).product(), want) < 1e-11


@theorem
@given(problems())
def test_weight_decay_is_horizontal_and_multiplies_the_update(problem: Problem) -> None:
    point = problem.draw().point()
    decay = LoRATangent(-point.B, -point.A)
    omega = connection_form(point, decay)
    # A A^+ - B^+ B = 0, each of norm sqrt(r).
    assert float(torch.linalg.matrix_norm(omega).max()) < EXACT[problem.dtype]
    rate = 0.05
    after = LoRAPoint(point.B + rate * decay.B, point.A + rate * decay.A)
    want = (1 - rate) ** 2 * (point.B.double() @ point.A.double())
    size = torch.linalg.matrix_norm(point.B.double()) * torch.linalg.matrix_norm(point.A.double())
    gap = torch.linalg.matrix_norm(after.B.double() @ after.A.double() - want)
    assert float((gap / size).max()) < {F64: 1e-14, F32: 1e-6}[problem.dtype]


@pytest.mark.parametrize("deficient", ["B", "A"])
def test_the_connection_is_refused_where_a_factor_lost_rank(deficient: str) -> None:
    draw = Problem(8, 9, 3, F32, 1.0, seed=0).draw()
    point, eta = draw.point(), draw.tangent()
    factors = {"B": point.B, "A": point.A}
    factors[deficient] = 0 * factors[deficient]
    point = LoRAPoint(**factors)
    for call in (connection_form, horizontal):
        with pytest.raises(GeometryError, match="The connection is undefined"):
            call(point, eta)
    with pytest.raises(GeometryError, match="The horizontal lift is undefined"):
        horizontal_lift(point, torch.zeros(8, 9))


def test_arguments_that_do_not_fit_are_refused() -> None:
    draw = Problem(8, 9, 3, F32, 1.0, seed=0).draw()
    point = draw.point()
    with pytest.raises(GeometryError, match=r"must have shape \(3, 3\)"):
        vertical(point, torch.zeros(2, 2))
    with pytest.raises(GeometryError, match=r"must have shape \(8, 9\)"):
        horizontal_lift(point, torch.zeros(9, 8))
    with pytest.raises(GeometryError, match="has factors of those shapes"):
        connection_form(point, LoRATangent(torch.zeros(8, 2), torch.zeros(2, 9)))
