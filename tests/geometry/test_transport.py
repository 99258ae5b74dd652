"""Properties 19 to 25: links, transport along a path and holonomy, against the lifted ODE."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from geometry_problems import F32, F64, Draw, Problem, error, problems, theorem
from hypothesis import given
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint, holonomy, is_admissible, link, overlap, transport

LINK = {F64: 1e-11, F32: 1e-3}
REVERSIBLE = {F64: 1e-11, F32: 1e-4}


class Curve:
    """X(t) = exp(tK) U diag(s(t)) Vᵀ exp(tL) with skew K and L, and its derivative."""

    def __init__(self, draw: Draw) -> None:
        p = draw.p

        def skew(size: int) -> np.ndarray:
            x = draw.normal(size, size).numpy()
            return 1.5 * (x - x.T) / np.linalg.norm(x - x.T, 2)

        self.k, self.l = skew(p.m), skew(p.n)
        self.u, self.v = draw.orthonormal(p.m, p.r).numpy(), draw.orthonormal(p.n, p.r).numpy()
        self.s = np.linspace(3.0, 1.0, p.r)
        self.rate = draw.normal(p.r).numpy() * 0.5

    def factors(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        b = scipy.linalg.expm(t * self.k) @ self.u * (self.s * np.exp(t * self.rate))
        return b, self.v.T @ scipy.linalg.expm(t * self.l)

    def derivative(self, t: float) -> np.ndarray:
        b, a = self.factors(t)
        return self.k @ b @ a + (b * self.rate) @ a + b @ a @ self.l

    def point(self, t: float) -> LoRAPoint:
        b, a = self.factors(t)
        return LoRAPoint(torch.from_numpy(b), torch.from_numpy(a))

    def lifted(self, start: LoRAPoint) -> LoRAPoint:
        """The horizontal lift at t = 1 by DOP853: (B, A)' = lift(X'), with pseudoinverses."""
        shape_b, shape_a = start.B.shape, start.A.shape
        size = start.B.numel()

        def slope(t: float, state: np.ndarray) -> np.ndarray:
            b, a = state[:size].reshape(shape_b), state[size:].reshape(shape_a)
            z = self.derivative(t)
            inverse_b, inverse_a = np.linalg.pinv(b), np.linalg.pinv(a)
            half = 0.5 * inverse_b @ z @ inverse_a
            return np.concatenate(
                [(z @ inverse_a - b @ half).ravel(), (inverse_b @ z - half @ a).ravel()]
            )

        state = np.concatenate([start.B.numpy().ravel(), start.A.numpy().ravel()])
        end = scipy.integrate.solve_ivp(
            slope, (0.0, 1.0), state, method="DOP853", rtol=1e-11, atol=1e-12
        ).y[:, -1]
        return LoRAPoint(
            torch.from_numpy(end[:size].reshape(shape_b)),
            torch.from_numpy(end[size:].reshape(shape_a)),
        )


def test_transport_converges_to_the_horizontal_lift_with_order_two() -> None:
    draw = Problem(10, 8, 3, F64, 60.0, seed=11).draw()
    curve = Curve(draw)
    start = curve.point(0.0).act(draw.gauge())
    want = curve.lifted(start)
    errors = []
    for count in (10, 20, 40, 80):
        # Every node in a gauge of its own.
        path = [start] + [curve.point(k / count).act(draw.gauge()) for k in range(1, count + 1)]
        frames = transport(path)
        assert len(frames) == len(path)
        end = frames[-1]
        assert error(end.product(), curve.point(1.0).product()) < 1e-13
        errors.append(max(error(end.B, want.B), error(end.A, want.A)))
    for larger, smaller in itertools.pairwise(errors):
        assert abs(math.log2(larger / smaller) - 2.0) < 0.1


def test_the_lift_of_a_ray_is_known_in_closed_form() -> None:
    draw = Problem(10, 8, 3, F64, 60.0, seed=12).draw()
    start = draw.point()
    path = [LoRAPoint(t * start.B, start.A).act(draw.gauge()) for t in (1.0, 1.5, 2.0, 4.0)]
    end = transport([start, *path])[-1]
    assert error(end.B, 2.0 * start.B) < 1e-12
    assert error(end.A, 2.0 * start.A) < 1e-12


@theorem
@given(problems())
def test_the_link_is_covariant(problem: Problem) -> None:
    draw = problem.draw()
    first = draw.balanced()
    second = draw.near(first)
    g, h = draw.gauge(), draw.gauge()
    moved = link(first.act(g).to(problem.dtype), second.to(F64).act(h).to(problem.dtype))
    assert moved.dtype == problem.dtype
    want = g @ link(first, second.to(F64)) @ torch.linalg.inv(h)
    scale = torch.linalg.matrix_norm(g) * torch.linalg.matrix_norm(torch.linalg.inv(h))
    gap = torch.linalg.matrix_norm(moved.to(F64) - want)
    assert float((gap / scale).max()) < LINK[problem.dtype]


@theorem
@given(problems())
def test_the_link_back_is_the_inverse(problem: Problem) -> None:
    draw = problem.draw()
    first = draw.balanced()
    second = draw.near(first)
    first = first.act(draw.gauge()).to(problem.dtype)
    there, back = link(first, second).to(F64), link(second, first).to(F64)
    scale = torch.linalg.matrix_norm(there) * torch.linalg.matrix_norm(back)
    gap = torch.linalg.matrix_norm(there @ back - torch.eye(problem.r))
    assert float((gap / scale).max()) < REVERSIBLE[problem.dtype]


@theorem
@given(problems())
def test_the_determinant_of_the_link_is_that_of_the_gram_matrices(problem: Problem) -> None:
    draw = problem.draw()
    first = draw.balanced()
    second = draw.near(first)
    first = first.act(draw.gauge()).to(problem.dtype)

    def log_volume(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.to(F64)).log().sum(-1)

    want = 0.5 * (log_volume(second.B) + log_volume(first.A))
    want = want - 0.5 * (log_volume(first.B) + log_volume(second.A))
    got = torch.linalg.svdvals(link(first, second).to(F64)).log().sum(-1)
    assert float((got - want).abs().max()) < LINK[problem.dtype]


@theorem
@given(problems())
def test_a_pure_gauge_link_is_the_inverse_of_the_gauge(problem: Problem) -> None:
    draw = problem.draw()
    point, g = draw.balanced(), draw.gauge()
    got = link(point.to(problem.dtype), point.act(g).to(problem.dtype))
    assert error(got, torch.linalg.inv(g)) < LINK[problem.dtype]


@theorem
@given(problems())
def test_the_link_continues_the_frame_and_keeps_the_update(problem: Problem) -> None:
    draw = problem.draw()
    start = draw.balanced()
    end = draw.near(start, size=0.01)
    u = link(start.to(problem.dtype), end)
    aligned = end.act(u)
    size = end.B.to(F64) @ end.A.to(F64)
    product = aligned.B.to(F64) @ aligned.A.to(F64)
    assert error(product, size) < {F64: 1e-12, F32: 1e-4}[problem.dtype]
    assert error(aligned.B, start.B) < 0.1
    assert error(aligned.A, start.A) < 0.1


def wilson(turn: Tensor) -> np.ndarray:
    return np.sort_complex(torch.linalg.eigvals(turn).numpy())


@theorem
@given(problems(dtypes=(F64,), min_rank=2, batches=((),)))
def test_wilson_eigenvalues_are_the_same_in_every_gauge(problem: Problem) -> None:
    draw = problem.draw()
    start = draw.balanced()
    loop = [start, *(draw.near(start, size=0.15) for _ in range(2))]
    turn = holonomy(loop)
    g = draw.gauge()
    moved = holonomy([start.act(g), *(point.act(draw.gauge()) for point in loop[1:])])
    assert abs(abs(float(torch.linalg.det(moved))) - 1.0) < 1e-10
    # Characteristic polynomials: eigenvalues that almost meet are no well-posed question.
    want, got = np.poly(turn.numpy()), np.poly(moved.numpy())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
    # The loop may name its first point again, in whatever gauge.
    closed = holonomy([*loop, start.act(draw.gauge())])
    assert error(closed, turn) < 1e-10


def test_wilson_eigenvalues_are_invariants_of_a_loop_with_separate_ones() -> None:
    draw = Problem(12, 10, 3, F64, 600.0, seed=2).draw()
    start = draw.balanced()
    loop = [start, *(draw.near(start, size=0.4) for _ in range(5))]
    turn = holonomy(loop)
    moved = holonomy([point.act(draw.gauge()) for point in loop])
    assert np.abs(wilson(turn) - 1.0).max() > 1e-3
    np.testing.assert_allclose(wilson(moved), wilson(turn), atol=1e-9)


def test_a_loop_without_area_has_no_holonomy() -> None:
    draw = Problem(12, 10, 3, F64, 20.0, seed=3).draw()
    start = draw.balanced()
    there = [start, *(draw.near(start) for _ in range(3))]
    loop = [point.act(draw.gauge()) for point in [*there, *there[-2:0:-1]]]
    assert error(holonomy(loop), torch.eye(3)) < 1e-9
    assert error(holonomy([start]), torch.eye(3)) < 1e-12


@pytest.mark.parametrize(("turns", "want"), [(1, -1.0), (2, 1.0)])
def test_for_rank_one_half_a_turn_of_both_lines_flips_the_frame(turns: int, want: float) -> None:
    draw = Problem(6, 5, 1, F64, 1.0, seed=4).draw()
    u, v = draw.orthonormal(6, 2), draw.orthonormal(5, 2)

    def point(angle: float) -> LoRAPoint:
        turn = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=F64)
        # A different factorization at every node: the sign and size of the frame are gauge.
        scale = float(draw.normal(1)) + 0.1
        return LoRAPoint(u @ turn * scale, (v @ turn).mT / scale)

    loop = [point(math.pi * turns * k / 16) for k in range(16)]
    assert abs(float(holonomy(loop)) - want) < 1e-10


def test_overlap_tells_neighbours_from_strangers() -> None:
    draw = Problem(60, 50, 4, F64, 60.0, seed=5).draw()
    point = draw.point()
    u0, v0 = torch.linalg.qr(point.B).Q, torch.linalg.qr(point.A.mT).Q
    near, stranger = draw.near(point), draw.point()
    u1, v1 = torch.linalg.qr(near.B).Q, torch.linalg.qr(near.A.mT).Q
    want = torch.linalg.svdvals(u0.mT @ u1)[-1] * torch.linalg.svdvals(v0.mT @ v1)[-1]
    assert abs(float(overlap(point, near) - want)) < 1e-12
    assert bool(is_admissible(point, near))
    assert not bool(is_admissible(point, stranger))
    assert not bool(is_admissible(point, near, min_overlap=1.0))
    assert bool(is_admissible(point, near.act(draw.gauge())))
    with pytest.raises(GeometryError, match="the overlap of two points is .* at least 0.1"):
        link(point, stranger)
    with pytest.raises(GeometryError, match="Take more checkpoints between them"):
        transport([point, near, stranger])
    with pytest.raises(GeometryError, match="the overlap of two points"):
        holonomy([point, stranger])


def test_points_whose_frames_are_opposite_have_no_link() -> None:
    # The columns turned by more than a right angle and the rows not at all.
    start = LoRAPoint(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    end = LoRAPoint(torch.tensor([[-0.8], [0.6]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(GeometryError, match="two points have no link"):
        link(start, end)


def test_a_spectrum_over_six_decades_does_not_hurt_a_link() -> None:
    draw = Problem(40, 30, 6, F64, 20.0, seed=7).draw()
    root = torch.logspace(0, -3, 6, dtype=F64)
    start = LoRAPoint(draw.orthonormal(40, 6) * root, root[:, None] * draw.orthonormal(30, 6).mT)
    end = LoRAPoint(start.B + 1e-2 * draw.normal(40, 6) * root, start.A)
    there, back = link(start, end), link(end, start)
    assert error(there @ back, torch.eye(6)) < 1e-10
    g, h = draw.gauge(), draw.gauge()
    assert error(link(start.act(g), end.act(h)), g @ there @ torch.linalg.inv(h)) < 1e-10


def test_a_cond_1e5_gauge_does_not_hurt_a_link() -> None:
    draw = Problem(48, 40, 6, F64, 1e5, seed=6).draw()
    first = draw.balanced()
    second = first.act(draw.orthonormal(6, 6))
    end = transport([first.act(draw.gauge()), second.act(draw.gauge())])[-1]
    assert error(end.product(), first.product()) < 1e-10


@pytest.mark.parametrize("call", [transport, holonomy])
def test_paths_that_are_none_are_refused(call) -> None:
    draw = Problem(8, 7, 3, F64, 1.0, seed=0).draw()
    point = draw.point()
    with pytest.raises(GeometryError, match="needs at least one point"):
        call([])
    with pytest.raises(GeometryError, match="all points of a path need one shape"):
        call([point, LoRAPoint(point.B[:, :2], point.A[:2])])
    with pytest.raises(GeometryError, match="A link is undefined at a rank-deficient point"):
        call([point, LoRAPoint(0 * point.B, point.A)])
