"""Properties 1 and 2, and what a point accepts and refuses."""

from __future__ import annotations

import pytest
import torch
from geometry_problems import F32, F64, Problem, error, problems, theorem
from hypothesis import given
from torch import Tensor, nn

from gauge_ext.adapters import LoRALinear
from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint, LoRATangent

PRESERVED = {F64: 1e-13, F32: 5e-5}
GROUP = {F64: 1e-13, F32: 1e-5}


@theorem
@given(problems())
def test_a_change_of_gauge_preserves_the_product(problem: Problem) -> None:
    draw = problem.draw()
    point = draw.balanced().to(problem.dtype)
    moved = point.act(draw.gauge())
    assert moved.dtype == problem.dtype
    want = point.B.double() @ point.A.double()
    assert error(moved.B.double() @ moved.A.double(), want) < PRESERVED[problem.dtype]


@theorem
@given(problems())
def test_the_group_law_holds(problem: Problem) -> None:
    draw = problem.draw()
    point, g, h = draw.balanced().to(problem.dtype), draw.gauge(), draw.gauge()
    twice, once = point.act(g).act(h), point.act(h @ g)
    # In float64 the inverse of h @ g itself has lost cond(h @ g) digits.
    tolerance = GROUP[problem.dtype] * (problem.condition if problem.dtype == F64 else 1.0)
    assert error(twice.B, once.B) < tolerance
    assert error(twice.A, once.A) < tolerance
    same = point.act(torch.eye(problem.r))
    assert torch.equal(same.B, point.B)
    assert torch.equal(same.A, point.A)


def test_one_gauge_serves_a_whole_batch() -> None:
    draw = Problem(9, 7, 3, F64, 20.0, seed=1, batch=(2, 3)).draw()
    point, one = draw.balanced(), draw.gauge()[0, 0]
    moved = point.act(one)
    assert moved.batch_shape == (2, 3)
    single = LoRAPoint(point.B[1, 2], point.A[1, 2]).act(one)
    assert error(moved.B[1, 2], single.B) < 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-2)], ids=str)
def test_gauge_condition_1e5_costs_the_storage_and_no_more(
    dtype: torch.dtype, tolerance: float
) -> None:
    draw = Problem(48, 40, 6, F64, 1e5, seed=2).draw()
    point = draw.balanced()
    moved = point.act(draw.gauge()).to(dtype)
    assert float((moved.singular_values() / point.singular_values() - 1).abs().max()) < tolerance
    assert int(moved.numerical_rank()) == 6


@theorem
@given(problems())
def test_singular_values_are_those_of_the_dense_product(problem: Problem) -> None:
    point = problem.draw().point()
    dense = torch.linalg.svdvals(point.B.double() @ point.A.double())[..., : problem.r]
    assert float(((point.singular_values() - dense).abs() / dense[..., :1]).max()) < 1e-12
    assert point.singular_values().dtype == F64
    assert bool((point.numerical_rank() == problem.r).all())


def test_from_layer_is_a_snapshot_of_the_effective_factors() -> None:
    layer = LoRALinear.from_linear(nn.Linear(6, 5), rank=2, scaling=1.5)
    nn.init.normal_(layer.lora_B)
    point = LoRAPoint.from_layer(layer)
    assert torch.equal(point.B, 1.5 * layer.lora_B)
    assert torch.allclose(point.product(), layer.delta_weight(), atol=1e-6)
    assert not point.B.requires_grad
    before = point.A.clone()
    with torch.no_grad():
        layer.lora_A.zero_()
    assert torch.equal(point.A, before)


def test_from_layer_raises_half_precision_to_float32() -> None:
    layer = LoRALinear.from_linear(nn.Linear(6, 5), rank=2, scaling=1.1, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    point = LoRAPoint.from_layer(layer)
    assert point.dtype == F32
    assert torch.equal(point.B, (1.1 * layer.lora_B.double()).to(F32))


def test_a_point_is_differentiable() -> None:
    draw = Problem(5, 4, 2, F64, 3.0, seed=3).draw()
    start, g = draw.balanced(), draw.gauge()

    def moved(b: Tensor, a: Tensor) -> Tensor:
        return LoRAPoint(b, a).act(g).product()

    inputs = (start.B.requires_grad_(), start.A.requires_grad_())
    assert torch.autograd.gradcheck(moved, inputs)


@pytest.mark.parametrize("kind", [LoRAPoint, LoRATangent])
@pytest.mark.parametrize(
    ("b", "a"),
    [
        ((4, 2), (3, 5)),
        ((4,), (4, 5)),
        ((2, 4, 3), (3, 5)),
        ((4, 0), (0, 5)),
    ],
)
def test_factors_that_do_not_fit_are_refused(kind: type, b: tuple, a: tuple) -> None:
    with pytest.raises(GeometryError, match=f"a {kind.__name__} needs B"):
        kind(torch.zeros(b), torch.zeros(a))


def test_factors_of_two_dtypes_are_refused() -> None:
    with pytest.raises(GeometryError, match="one floating dtype"):
        LoRAPoint(torch.zeros(4, 2), torch.zeros(2, 5, dtype=F64))
    with pytest.raises(GeometryError, match="one floating dtype"):
        LoRAPoint(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))


def test_gauges_that_do_not_fit_are_refused() -> None:
    point = Problem(6, 5, 3, F64, 1.0, seed=0).draw().balanced()
    with pytest.raises(GeometryError, match="must have shape"):
        point.act(torch.eye(2))
    with pytest.raises(GeometryError, match="singular"):
        point.act(torch.zeros(3, 3))


def test_a_rank_deficient_point_exists_and_says_so_when_asked() -> None:
    point = LoRAPoint(torch.zeros(2, 4, 3), torch.randn(2, 3, 5))
    assert point.numerical_rank().tolist() == [0, 0]
    with pytest.raises(GeometryError, match=r"The connection is undefined .* rank 0 at batch"):
        point.require_full_rank("The connection")


def test_tangent_vectors_are_a_vector_space() -> None:
    draw = Problem(6, 5, 3, F64, 1.0, seed=0, batch=(2,)).draw()
    x, y = draw.tangent(), draw.tangent()
    z = 2.0 * x - y * 0.5 + (-x)
    assert error(z.B, x.B - 0.5 * y.B) < 1e-15
    assert error(z.A, x.A - 0.5 * y.A) < 1e-15
    scaled = x * torch.tensor([1.0, 3.0], dtype=F64)[:, None, None]
    assert torch.equal(scaled.A[1], 3 * x.A[1])
    with pytest.raises(GeometryError, match="has factors of those shapes"):
        x.require_at(LoRAPoint(x.B[0], x.A[0]))


def test_to_moves_between_dtypes() -> None:
    draw = Problem(6, 5, 3, F64, 1.0, seed=0).draw()
    assert draw.balanced().to(F32).dtype == F32
    assert draw.balanced().to().dtype == F64
    assert draw.tangent().to(F32, "cpu").dtype == F32
