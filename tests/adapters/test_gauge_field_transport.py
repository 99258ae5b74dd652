"""The geometry of a gauge field: its connection, its lifts, and transport along checkpoints."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gauge_fields import DTYPES, SEEDS, SHAPES, TIGHT, error, field_of, update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gauge_ext import LoRAGaugeField
from gauge_ext.errors import ConfigError, GeometryError
from gauge_ext.geometry import LoRAPoint


@settings(max_examples=15)
@given(SHAPES, SEEDS, DTYPES, st.sampled_from([1.0, 0.25, -3.0]))
def test_the_connection_of_a_change_of_gauge_is_its_generator(shape, seed, dtype, scaling) -> None:
    field = field_of(*shape, seed, dtype, scaling)
    phi, a = (field.gauge_field[name].detach() for name in ("phi", "A"))
    generator = torch.randn(shape[2], shape[2], dtype=dtype)
    for weight in (0.5, 0.2):
        found = field.connection(-phi @ generator, generator @ a, weight=weight)
        assert error(found, generator) <= TIGHT[dtype]


@settings(max_examples=15)
@given(SHAPES, SEEDS, DTYPES, st.sampled_from([1.0, 0.25, -3.0]))
def test_the_horizontal_lift_moves_the_update_and_not_the_frame(
    shape, seed, dtype, scaling
) -> None:
    field = field_of(*shape, seed, dtype, scaling)
    phi, a = (field.gauge_field[name].detach().double() for name in ("phi", "A"))
    m, n, rank = shape
    motion = torch.randn(m, rank).double(), torch.randn(rank, n).double()
    z = scaling * (motion[0] @ a + phi @ motion[1])
    dphi, da = (part.double() for part in field.horizontal_lift(z))
    assert error(scaling * (dphi @ a + phi @ da), z) <= TIGHT[dtype]
    size = float(dphi.norm() / phi.norm() + da.norm() / a.norm())
    assert float(field.connection(dphi, da).norm()) <= 100 * TIGHT[dtype] * size


def test_the_connection_is_undefined_before_training_and_says_so() -> None:
    field = LoRAGaugeField(nn.Linear(6, 4), rank=2)
    with pytest.raises(GeometryError, match="rank-deficient"):
        field.connection(torch.zeros(4, 2), torch.zeros(2, 6))
    with pytest.raises(GeometryError, match="rank-deficient"):
        field.horizontal_lift(torch.zeros(4, 6))


@settings(max_examples=15)
@given(SHAPES, SEEDS, st.sampled_from(["svd", "balanced", "equal_energy", "left", "pivot"]))
def test_a_change_of_gauge_changes_no_output(shape, seed, name) -> None:
    field = field_of(*shape, seed, torch.float64, 0.5)
    x, before = update(field), {k: id(p) for k, p in field.named_parameters()}
    field.gauge_fix(name)
    assert error(update(field), x) <= 1e-12
    assert {k: id(p) for k, p in field.named_parameters()} == before
    if name == "svd":
        phi, a = field.point().B, field.point().A
        torch.testing.assert_close(phi.mT @ phi, a @ a.mT, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(SHAPES, SEEDS)
def test_transport_along_the_line_arrives_at_the_nearest_matrix_of_that_rank(shape, seed) -> None:
    m, n, rank = shape
    field = field_of(m, n, rank, seed, torch.float64, 0.5)
    base = field.base_model.weight.detach()
    offset = torch.randn(m, n, dtype=torch.float64)
    path = field.compute_parallel_path(base, base + offset)
    found = field.parallel_transport(base + offset)
    u, s, vh = torch.linalg.svd(offset, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
    # The randomized decomposition errs by its gap; what it leaves out can only be a little more.
    assert float((found - base - offset).norm()) <= 1.01 * float(s[rank:].norm()) + 1e-12
    if s.shape[0] == rank or s[rank] < 0.7 * s[rank - 1]:
        assert error(found - base, nearest) <= 0.05
    left_out = float((found - base - offset).norm() / offset.norm())
    assert path.residual == pytest.approx(left_out, rel=1e-6, abs=1e-7)


@settings(max_examples=15)
@given(SHAPES, SEEDS, DTYPES)
def test_the_line_is_lifted_by_the_square_root_of_time(shape, seed, dtype) -> None:
    m, n, rank = shape
    field = field_of(m, n, rank, seed, dtype)
    base = field.base_model.weight.detach()
    x = torch.randn(m, rank, dtype=dtype) @ torch.randn(rank, n, dtype=dtype)
    path = field.compute_parallel_path(base, base + x)
    t, step = 0.3, 1e-6
    here, there = path.at(t), path.at(t + step)
    close = {torch.float64: 1e-11, torch.float32: 1e-3}[dtype]
    assert error(here.product(), t * path.end.product()) <= 1e-12
    assert error(path.end.product(), x) <= close
    field.assign(here)
    velocity = (there.B - here.B) / step, (there.A - here.A) / step
    size = float(velocity[0].norm() / here.B.norm() + velocity[1].norm() / here.A.norm())
    assert float(field.connection(*velocity).norm()) <= 1e-5 * size * (1 if close < 1e-6 else 1e3)
    with pytest.raises(ConfigError, match="t must lie"):
        path.at(1.5)


def smooth_path(steps: int) -> tuple[Tensor, list[Tensor]]:
    """W_0 and W_0 + X(t): rank 2, both spaces turning, singular values crossing on the way."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = draw(9, 7)
    b, a = (torch.linalg.qr(draw(size, 4))[0] for size in (9, 7))
    path = []
    for k in range(steps + 1):
        t = torch.tensor(k / steps, dtype=torch.float64)
        left = b[:, :2] * torch.cos(t) + b[:, 2:] * torch.sin(t)
        right = a[:, :2] * torch.cos(t) + a[:, 2:] * torch.sin(t)
        values = torch.stack([2 - 1.2 * t, 1 + 0.9 * t])
        path.append(base + (left * values) @ right.mT)
    return base, path


def test_frames_carried_along_checkpoints_move_smoothly_where_separate_ones_jump() -> None:
    base, weights = smooth_path(12)
    layer = nn.Linear(7, 9, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(base)
    field = LoRAGaugeField(layer, rank=2)
    path = field.compute_parallel_path(base, weights[-1], weights[:-1])
    assert len(path.frames) == 13
    assert min(path.overlaps) > 0.9
    for frame, weight in zip(path.frames, weights, strict=True):
        assert error(frame.product(), weight - base) <= 1e-12

    def jump(points: list[LoRAPoint]) -> float:
        return max(float((q.A - p.A).norm() / p.A.norm()) for p, q in pairwise(points))

    separate = [field.compute_parallel_path(base, weight).end for weight in weights]
    assert jump(list(path.frames)) < 0.2  # twelve steps over one radian
    assert jump(separate) > 1.0  # the singular values cross, and so the columns trade places
    assert error(field.execute_parallel_transport(path), weights[-1]) <= 1e-12
    assert torch.equal(field.parallel_transport(weights[-1], weights[:-1]), field.merged_weight())


def test_transport_between_unrelated_checkpoints_is_refused() -> None:
    field = LoRAGaugeField(nn.Linear(40, 40, dtype=torch.float64), rank=2)
    base = field.base_model.weight.detach()
    far = [base + torch.randn(40, 2).double() @ torch.randn(2, 40).double() for _ in range(2)]
    with pytest.raises(GeometryError, match="from node 0 of the path to the next"):
        field.parallel_transport(far[1], far[:1])
    lower = base + torch.outer(torch.randn(40).double(), torch.randn(40).double())
    with pytest.raises(GeometryError, match="one rank"):
        field.parallel_transport(far[1], [lower])


def test_directions_that_the_target_leaves_unused_can_still_be_trained() -> None:
    field = LoRAGaugeField(nn.Linear(8, 6, dtype=torch.float64), rank=3)
    base = field.base_model.weight.detach()
    assert torch.equal(field.parallel_transport(base), base)
    target = base + torch.outer(torch.randn(6).double(), torch.randn(8).double())
    torch.testing.assert_close(field.parallel_transport(target), target)
    phi, a = field.gauge_field["phi"], field.gauge_field["A"]
    assert (phi != 0).any(0).tolist() == [True, False, False]
    assert bool((a.norm(dim=1) > 1e-2).all())
    field(torch.randn(5, 8).double()).square().sum().backward()
    assert bool((phi.grad.norm(dim=0) > 1e-3).all())


def test_a_rank_above_the_sides_of_the_layer_works() -> None:
    field = LoRAGaugeField(nn.Linear(5, 3), rank=8)
    target = torch.randn(3, 5)
    torch.testing.assert_close(field.parallel_transport(target), target, rtol=1e-5, atol=1e-5)
