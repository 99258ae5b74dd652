"""The seed's gauge field: its own use of it, and its way into one plain layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from gauge_fields import Curved, OnlyDim, SeedBase, Transposed, trained, update
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
from gauge_ext.models import merge, merged_copy


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
