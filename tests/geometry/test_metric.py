"""Properties 3, 11 to 14, 38, 40 and 42: the metric, its gradient and the Hessian against it."""

from __future__ import annotations

import pytest
import torch
from geometry_problems import (
    F32,
    F64,
    Problem,
    dense_differential,
    dense_metric,
    error,
    problems,
    theorem,
)
from hypothesis import given
from torch import Tensor

from gauge_ext import ops
from gauge_ext.errors import GeometryError
from gauge_ext.geometry import (
    LoRAPoint,
    LoRATangent,
    connection_form,
    horizontal,
    metric,
    project,
    quotient_metric,
    riemannian_gradient,
)

INVARIANCE = {F64: 1e-12, F32: 1e-4}
EXACT = {F64: 1e-12, F32: 1e-5}
HORIZONTAL = {F64: 1e-11, F32: 2e-3}


def gradients(point: LoRAPoint) -> tuple[LoRATangent, Tensor]:
    """(g_B, g_A) of a loss by the compiled op and autograd, and the loss's gradient by X."""
    b, a = point.B.clone().requires_grad_(), point.A.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, a.shape[1], generator=generator, dtype=F64).to(point.dtype)
    target = torch.randn(12, b.shape[0], generator=generator, dtype=F64).to(point.dtype)
    weight = torch.zeros(b.shape[0], a.shape[1], dtype=point.dtype)
    residual = ops.lora_linear(x, weight, None, a, b, 1.0) - target
    g_b, g_a = torch.autograd.grad(0.5 * residual.square().sum(), (b, a))
    by_hand = x.double() @ point.A.double().mT @ point.B.double().mT - target.double()
    return LoRATangent(g_b, g_a), by_hand.mT @ x.double()


@theorem
@given(problems())
def test_the_metric_is_its_definition_and_invariant_under_the_group(problem: Problem) -> None:
    draw = problem.draw()
    point, eta, xi = draw.balanced().to(problem.dtype), draw.tangent(), draw.tangent()
    g = draw.gauge()
    want = dense_metric(point, eta, xi)
    scale = (dense_metric(point, eta, eta) * dense_metric(point, xi, xi)).sqrt()
    assert bool(((metric(point, eta, xi) - want).abs() <= EXACT[problem.dtype] * scale).all())
    moved = metric(point.act(g), eta.act(g), xi.act(g))
    assert moved.dtype == F64
    assert moved.shape == problem.batch
    assert bool(((moved - want).abs() <= INVARIANCE[problem.dtype] * scale).all())


@theorem
@given(problems())
def test_the_quotient_metric_is_the_metric_of_the_horizontal_part(problem: Problem) -> None:
    draw = problem.draw()
    g = draw.gauge()
    point = draw.balanced().act(g).to(problem.dtype)
    eta, xi = draw.tangent(g), draw.tangent(g)
    h_eta, h_xi = horizontal(point, eta), horizontal(point, xi)
    z, y = dense_differential(point, eta), dense_differential(point, xi)
    lengths = (dense_metric(point, h_eta, h_eta), dense_metric(point, h_xi, h_xi))
    scale = (lengths[0] * lengths[1]).sqrt()
    tolerance = INVARIANCE[problem.dtype]
    assert bool(((quotient_metric(point, z) - lengths[0]).abs() <= tolerance * lengths[0]).all())
    want = dense_metric(point, h_eta, h_xi)
    assert bool(((quotient_metric(point, z, y) - want).abs() <= tolerance * scale).all())
    # Dense or in factor form, and within the bounds that need no factor at all.
    in_factors = quotient_metric(point, project(point, eta), project(point, xi))
    assert bool(((in_factors - want).abs() <= tolerance * scale).all())
    square = z.square().sum((-2, -1))
    got = quotient_metric(point, z)
    assert bool((got >= 0.5 * square * (1 - tolerance)).all())
    assert bool((got <= square * (1 + tolerance)).all())


@theorem
@given(problems(batches=((),)))
def test_the_riemannian_gradient_represents_the_differential(problem: Problem) -> None:
    draw = problem.draw()
    gauge = draw.gauge()
    point = draw.balanced().act(gauge).to(problem.dtype)
    xi = draw.tangent(gauge)
    gradient, by_x = gradients(point)
    eta = riemannian_gradient(point, gradient)
    assert eta.dtype == problem.dtype
    want = (by_x * dense_differential(point, xi)).sum()
    scale = (dense_metric(point, eta, eta) * dense_metric(point, xi, xi)).sqrt()
    assert abs(metric(point, eta, xi) - want) <= EXACT[problem.dtype] * scale


@theorem
@given(problems(batches=((),)))
def test_noether_the_gradients_of_the_factors_satisfy_r_squared_identities(
    problem: Problem,
) -> None:
    point = problem.draw().point()
    gradient, _ = gradients(point)
    left = point.B.double().mT @ gradient.B.double()
    right = gradient.A.double() @ point.A.double().mT
    scale = torch.linalg.matrix_norm(point.B.double()) * torch.linalg.matrix_norm(
        gradient.B.double()
    ) + torch.linalg.matrix_norm(point.A.double()) * torch.linalg.matrix_norm(gradient.A.double())
    assert float(torch.linalg.matrix_norm(left - right) / scale) < EXACT[problem.dtype]


@theorem
@given(problems(batches=((),)))
def test_the_scaled_gradient_is_horizontal_and_moves_x_by_its_projected_gradient(
    problem: Problem,
) -> None:
    point = problem.draw().point()
    gradient, by_x = gradients(point)
    eta = riemannian_gradient(point, gradient)
    b, a = point.B.double(), point.A.double()
    of_a = eta.A.double() @ torch.linalg.pinv(a)
    of_b = torch.linalg.pinv(b) @ eta.B.double()
    assert error(of_a, of_b) < HORIZONTAL[problem.dtype]
    omega = connection_form(point, eta)
    assert (
        float(torch.linalg.matrix_norm(omega) / torch.linalg.matrix_norm(of_b))
        < (HORIZONTAL[problem.dtype])
    )
    p_u, p_v = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    want = p_u @ by_x + by_x @ p_v
    assert error(dense_differential(point, eta), want) < HORIZONTAL[problem.dtype]


@theorem
@given(problems(dtypes=(F64,), batches=((),)))
def test_step_ratios_are_horizontal_for_the_connection_of_their_weight(problem: Problem) -> None:
    point = problem.draw().point()
    eta = riemannian_gradient(point, gradients(point)[0])
    step_b, step_a = 16.0, 1.0
    scaled = LoRATangent(step_b * eta.B, step_a * eta.A)
    scale = torch.linalg.matrix_norm(torch.linalg.pinv(point.B) @ scaled.B)
    weight = step_b / (step_b + step_a)
    omega = connection_form(point, scaled, weight)
    assert float(torch.linalg.matrix_norm(omega) / scale) < 1e-11
    assert float(torch.linalg.matrix_norm(connection_form(point, scaled)) / scale) > 0.1


@theorem
@given(problems(dtypes=(F64,), batches=((),)))
def test_covariant_damping_filters_the_singular_values(problem: Problem) -> None:
    point = problem.draw().point()
    gradient, by_x = gradients(point)
    damping = 2.5
    eta = riemannian_gradient(point, gradient, damping=damping)
    u, s, _ = torch.linalg.svd(point.product(), full_matrices=False)
    u, s = u[:, : problem.r], s[: problem.r]
    want = (u * (s**2 / (s**2 + damping))) @ u.mT @ by_x
    assert error(point.B @ eta.A, want) < 1e-10
    undamped = riemannian_gradient(point, gradient)
    assert torch.equal(eta.B, undamped.B)


def test_covariant_damping_is_defined_before_training() -> None:
    draw = Problem(9, 7, 3, F64, 50.0, seed=0).draw()
    start = draw.balanced()
    point = LoRAPoint(torch.zeros_like(start.B), start.A)
    gradient, by_x = gradients(point)
    eta = riemannian_gradient(point, gradient, damping=0.1)
    assert not eta.A.any()
    p_v = torch.linalg.pinv(start.A) @ start.A
    assert error(eta.B @ start.A, by_x @ p_v) < 1e-12
    with pytest.raises(GeometryError, match="gradient without damping is undefined"):
        riemannian_gradient(point, gradient)
    with pytest.raises(GeometryError, match="damping must be at least 0"):
        riemannian_gradient(point, gradient, damping=-1.0)
    empty = LoRAPoint(start.B, torch.zeros_like(start.A))
    with pytest.raises(GeometryError, match="undefined at a rank-deficient point"):
        riemannian_gradient(empty, gradient, damping=0.1)


@theorem
@given(problems(batches=((),)))
def test_gate_gradients_are_read_off_the_factors_and_in_the_svd_gauge_off_x(
    problem: Problem,
) -> None:
    point = problem.draw().point()
    gradient, by_x = gradients(point)
    gates = torch.ones(problem.r, dtype=problem.dtype, requires_grad=True)
    x_of_gates = (point.B * gates) @ point.A
    (want,) = torch.autograd.grad((x_of_gates * by_x.to(problem.dtype)).sum(), gates)
    of_b = (point.B * gradient.B).sum(0)
    of_a = (point.A * gradient.A).sum(1)
    scale = torch.linalg.vector_norm(point.B, dim=0) * torch.linalg.vector_norm(gradient.B, dim=0)
    scale = scale + torch.linalg.vector_norm(point.A, dim=1) * torch.linalg.vector_norm(
        gradient.A, dim=1
    )
    tolerance = EXACT[problem.dtype]
    assert bool(((of_b - want).abs() <= tolerance * scale).all())
    assert bool(((of_a - want).abs() <= tolerance * scale).all())
    u, s, vh = torch.linalg.svd(point.to(F64).product(), full_matrices=False)
    u, s, vh = u[:, : problem.r], s[: problem.r], vh[: problem.r]
    svd = LoRAPoint(u * s.sqrt(), s.sqrt()[:, None] * vh)
    grad_b = by_x @ svd.A.mT
    sigma_ugv = s * (u * (by_x @ vh.mT)).sum(0)
    assert float(((svd.B * grad_b).sum(0) - sigma_ugv).abs().max()) <= 1e-12 * float(s[0]) * float(
        torch.linalg.matrix_norm(by_x)
    )


@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e4])
def test_the_hessian_at_the_optimum_is_0_1_2_against_the_metric(kappa: float) -> None:
    m, n, r = 7, 6, 3
    draw = Problem(m, n, r, F64, 10.0, seed=4).draw()
    sigma = torch.logspace(0, -float(torch.tensor(kappa).log10()), r, dtype=F64).sqrt()
    point = LoRAPoint(draw.orthonormal(m, r) * sigma, sigma[:, None] * draw.orthonormal(n, r).mT)
    target = point.product()
    size = m * r

    def unpack(flat: Tensor) -> LoRATangent:
        return LoRATangent(flat[:size].reshape(m, r), flat[size:].reshape(r, n))

    def loss(flat: Tensor) -> Tensor:
        pair = unpack(flat)
        return 0.5 * (pair.B @ pair.A - target).square().sum()

    flat = torch.cat([point.B.flatten(), point.A.flatten()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    values = torch.linalg.eigvalsh(hessian)
    assert int((values < 1e-12 * values[-1]).sum()) == r * r
    basis = [unpack(row) for row in torch.eye(len(flat), dtype=F64)]
    every = LoRATangent(torch.stack([e.B for e in basis]), torch.stack([e.A for e in basis]))
    points = LoRAPoint(point.B.expand_as(every.B), point.A.expand_as(every.A))
    gram = torch.stack(
        [
            metric(points, LoRATangent(e.B.expand_as(every.B), e.A.expand_as(every.A)), every)
            for e in basis
        ]
    )
    lower = torch.linalg.cholesky(gram)
    half = torch.linalg.solve_triangular(lower, hessian, upper=False)
    pencil = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    relative = torch.linalg.eigvalsh(0.5 * (pencil + pencil.mT))
    want = torch.tensor([0.0] * r**2 + [1.0] * (r * (m + n - 2 * r)) + [2.0] * r**2, dtype=F64)
    assert float((relative - want).abs().max()) < 1e-5


def test_vectors_that_do_not_fit_are_refused() -> None:
    draw = Problem(9, 7, 3, F64, 1.0, seed=0).draw()
    point, eta = draw.balanced(), draw.tangent()
    wide = LoRATangent(torch.zeros(9, 4, dtype=F64), torch.zeros(4, 7, dtype=F64))
    with pytest.raises(GeometryError, match="has factors of those shapes"):
        metric(point, eta, wide)
    with pytest.raises(GeometryError, match=r"must have shape \(9, 7\), got \(7, 9\)"):
        quotient_metric(point, torch.zeros(7, 9))
    with pytest.raises(GeometryError, match="metric of the updates is undefined"):
        quotient_metric(LoRAPoint(point.B, 0 * point.A), torch.zeros(9, 7))
