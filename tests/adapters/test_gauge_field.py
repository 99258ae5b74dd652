"""The seed's gauge field: its own use of it, its geometry, and its way into one plain layer."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gauge_ext import LoRAGaugeField, ops
from gauge_ext.adapters import LoRALinear
from gauge_ext.errors import (
    AdapterStateError,
    ConfigError,
    GeometryError,
    NonFiniteError,
    TargetError,
)
from gauge_ext.geometry import LoRAPoint
from gauge_ext.models import merge, merged_copy

TIGHT = {torch.float64: 1e-11, torch.float32: 1e-3}


class SeedBase(nn.Module):
    """What the seed calls base_model: something with dim, weight and a forward."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Transposed(SeedBase):
    """Its weight acts from the other side, so W + phi A would be wrong in it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Curved(SeedBase):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class OnlyDim(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.inner = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def trained(base: nn.Module, rank: int = 3, scaling: float = 1.0) -> LoRAGaugeField:
    field = LoRAGaugeField(base, rank, scaling=scaling)
    nn.init.normal_(field.gauge_field["phi"], std=0.4)
    nn.init.normal_(field.gauge_field["A"], std=0.4)
    return field


def field_of(
    m: int, n: int, rank: int, seed: int, dtype: torch.dtype, scaling: float = 1.0
) -> LoRAGaugeField:
    torch.manual_seed(seed)
    return trained(nn.Linear(n, m, dtype=dtype), rank, scaling)


def update(field: LoRAGaugeField) -> Tensor:
    """S phi A in float64, by hand."""
    phi, a = field.gauge_field["phi"].detach(), field.gauge_field["A"].detach()
    return field.scaling * phi.double() @ a.double()


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


SHAPES = st.tuples(st.integers(3, 20), st.integers(3, 20), st.integers(1, 3))
SEEDS = st.integers(0, 10**6)
DTYPES = st.sampled_from([torch.float64, torch.float32])


def test_the_seeds_own_use_of_it() -> None:
    base_model = SeedBase(16)
    field = LoRAGaugeField(base_model, rank=8)
    assert field.gauge_field["A"].shape == (8, 16)
    assert field.gauge_field["phi"].shape == (16, 8)
    x = torch.randn(4, 16)
    torch.testing.assert_close(field(x), base_model(x))
    target = base_model.weight.detach() + torch.randn(16, 8) @ torch.randn(8, 16)
    transported_weights = field.parallel_transport(target)
    torch.testing.assert_close(transported_weights, target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(field(x), x @ target.T, rtol=1e-4, atol=1e-4)
    path = field.compute_parallel_path(base_model.weight, target)
    assert torch.equal(field.execute_parallel_transport(path), transported_weights)


@pytest.mark.parametrize("scaling", [1.0, -0.5])
def test_the_output_is_that_of_the_weight_plus_phi_a(dtype: torch.dtype, scaling: float) -> None:
    field = trained(nn.Linear(9, 5, dtype=dtype), scaling=scaling)
    base = field.base_model
    x = torch.randn(2, 4, 9, dtype=dtype)
    weight = base.weight.double() + update(field)
    expected = (x.double() @ weight.T + base.bias.double()).to(dtype)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(field(x), expected, rtol=close, atol=close)
    assert field.gauge_field["A"].dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)


def test_a_fresh_field_changes_nothing_and_only_it_is_trained() -> None:
    base = nn.Linear(6, 4)
    field = LoRAGaugeField(base, rank=2)
    x = torch.randn(3, 6)
    assert not field.delta_weight().any()
    # The kernels sum a product of few rows in an order of their own: the rounding may differ.
    torch.testing.assert_close(field(x), base(x), rtol=1e-6, atol=1e-6)
    assert [name for name, p in field.named_parameters() if p.requires_grad] == [
        "gauge_field.A",
        "gauge_field.phi",
    ]
    field(x).square().sum().backward()
    assert field.gauge_field["phi"].grad.abs().sum() > 0
    assert base.weight.grad is None


def test_over_a_linear_layer_it_is_the_compiled_op_on_the_bases_own_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    field = trained(nn.Linear(6, 4))
    seen: list[tuple[object, ...]] = []

    def spy(*args: object) -> Tensor:
        seen.append(args)
        return torch.ops.gauge_ext.lora_linear(*args)

    monkeypatch.setattr(ops, "lora_linear", spy)
    x = torch.randn(2, 6)
    field(x)
    assert seen[0][1] is field.base_model.weight
    # A hook on the base has to be heard, so the base itself must be called.
    heard = []
    field.base_model.register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(field(x), x @ (field.merged_weight().T) + field.base_model.bias)
    assert len(seen) == 1
    assert heard == [1]


@pytest.mark.parametrize("base", [SeedBase(6), Transposed(6), Curved(6), OnlyDim(6)])
def test_any_base_gets_the_update_added_to_its_output(base: nn.Module) -> None:
    field = trained(base)
    x = torch.randn(3, 6)
    torch.testing.assert_close(
        field(x).double(), base(x).double() + x.double() @ update(field).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: SeedBase(6)])
def test_merging_is_by_hand_and_leaves_the_field_alone(make) -> None:
    base = make()
    field = trained(base, scaling=0.7)
    before = copy.deepcopy(field.state_dict())
    plain = field.to_linear()
    assert type(plain) is type(base)
    expected = (base.weight.double() + update(field)).float()
    torch.testing.assert_close(plain.weight, expected, rtol=1e-6, atol=1e-7)
    if isinstance(base, nn.Linear):
        assert plain.bias is base.bias
    x = torch.randn(4, base.weight.shape[1])
    torch.testing.assert_close(plain(x), field(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(field.merge()(x), plain(x))
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    assert field.base_model is base


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (Transposed(6), "is not x Wᵀ"),
        (Curved(6), "is not x Wᵀ"),
        (OnlyDim(6), "not a plain parameter"),
    ],
)
def test_a_base_that_cannot_take_the_update_is_not_merged(base: nn.Module, words: str) -> None:
    with pytest.raises(AdapterStateError, match=words):
        trained(base).to_linear()


def test_another_adapter_inside_the_base_is_not_counted_twice() -> None:
    field = trained(nn.Linear(6, 6))
    LoRALinear.from_linear(field.base_model)
    with pytest.raises(AdapterStateError, match="another adapter"):
        field.to_linear()
    nn.init.normal_(field.base_model.lora_B)
    x = torch.randn(3, 6)
    torch.testing.assert_close(merged_copy(field)(x), field(x), rtol=1e-4, atol=1e-5)


def test_merged_copies_hold_the_base_merged_wherever_the_field_was() -> None:
    shared = trained(nn.Linear(6, 6))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, trained(Curved(6)))})
    twin = merged_copy(model)
    assert type(twin["a"]) is nn.Linear
    assert twin["a"] is twin["b"][0]
    assert type(twin["b"][1]) is LoRAGaugeField
    x = torch.randn(3, 6)
    torch.testing.assert_close(twin["b"](x), model["b"](x), rtol=1e-5, atol=1e-5)
    assert model["a"] is shared
    with pytest.raises(AdapterStateError, match="hold their base as a submodule"):
        merge(model)
    with torch.no_grad():
        shared.gauge_field["A"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"a: gauge_field\.A holds NaN"):
        merged_copy(model)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: OnlyDim(6)])
def test_it_exports_to_onnx_and_agrees(make, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from gauge_ext.export import export_onnx

    model = nn.Sequential(trained(make()), nn.ReLU(), nn.Linear(6, 2))
    path = tmp_path / "field.onnx"
    report = export_onnx(model, (torch.randn(2, 6),), path, dynamic_shapes=({0: "batch"},))
    assert report.validation.passed
    found = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    if isinstance(model[0].base_model, nn.Linear):
        assert not [name for name in found if "gauge_field" in name]
        weight = torch.from_numpy(onnx.numpy_helper.to_array(found["0.weight"]).copy())
        expected = model[0].base_model.weight.double() + update(model[0])
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_it_survives_compiling_copying_pickling_and_its_state_dict() -> None:
    field = trained(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    expected = field(x)
    compiled = torch.compile(field, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(copy.deepcopy(field)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(field))(x), expected)
    other = LoRAGaugeField(nn.Linear(6, 4), rank=3)
    other.load_state_dict(field.state_dict())
    assert torch.equal(other(x), expected)
    assert field.double()(x.double()).dtype is torch.float64
    assert "rank=3" in repr(field)


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


def test_what_cannot_be_used_is_refused_by_name() -> None:
    field = LoRAGaugeField(nn.Linear(6, 4), rank=2)
    with pytest.raises(GeometryError, match=r"must have shape \(4, 6\)"):
        field.parallel_transport(torch.zeros(6, 4))
    with pytest.raises(NonFiniteError, match="at node 0"):
        field.parallel_transport(torch.full((4, 6), torch.nan))
    wide = LoRAGaugeField(nn.Linear(6, 4), rank=3)
    base = wide.base_model.weight
    with pytest.raises(GeometryError, match="the path ends at factors of rank 3"):
        field.execute_parallel_transport(wide.compute_parallel_path(base, torch.randn(4, 6)))
    with pytest.raises(AdapterStateError, match="has no weight"):
        LoRAGaugeField(OnlyDim(6), rank=2).parallel_transport(torch.zeros(6, 6))
    with pytest.raises(TargetError, match="neither"):
        LoRAGaugeField(nn.ReLU(), rank=2)
    with pytest.raises(TargetError, match=r"must be an nn\.Module"):
        LoRAGaugeField(torch.zeros(3, 3), rank=2)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="has an adapter already"):
        LoRAGaugeField(LoRALinear(4, 4), rank=2)
    codes = nn.Linear(4, 4)
    codes.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="floating-point"):
        LoRAGaugeField(codes, rank=2)
    with pytest.raises(ConfigError, match="rank must be a whole number"):
        LoRAGaugeField(nn.Linear(4, 4), rank=0)
    with pytest.raises(ConfigError, match="scaling must be a finite number other than 0"):
        LoRAGaugeField(nn.Linear(4, 4), rank=2, scaling=0.0)
