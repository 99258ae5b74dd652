"""An adapted layer merged: rounded once, taken back bit for bit, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_layers import TOLERANCE, adapted, weight_by_hand
from torch import nn
from torch.nn import functional as F

from gauge_ext.adapters import LoRALinear
from gauge_ext.errors import AdapterStateError, NonFiniteError


def test_merging_rounds_once(dtype: torch.dtype) -> None:
    layer = adapted(33, 17, dtype=dtype, rank=5)
    exact = weight_by_hand(layer)
    layer.merge()
    assert layer.weight.dtype is dtype
    # Half a unit in the last place of W's dtype, and the noise of the float32 sum before it.
    eps = torch.finfo(dtype).eps
    noise = 8 * (torch.finfo(torch.float32).eps if dtype is not torch.float64 else eps)
    error = (layer.weight.detach().double() - exact).abs()
    assert bool((error <= exact.abs() * (eps / 2) * (1 + 1e-3) + noise).all())


def test_merging_in_bfloat16_is_the_float32_sum_rounded() -> None:
    layer = adapted(64, 48, dtype=torch.bfloat16)
    delta = layer.lora_B.detach() @ layer.lora_A.detach() * layer.scaling
    expected = (layer.weight.detach().float() + delta).to(torch.bfloat16)
    layer.merge()
    assert torch.equal(layer.weight.detach(), expected)


def test_unmerging_gives_the_very_parameter_back(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    layer.weight.requires_grad_(False)
    weight, bits = layer.weight, layer.weight.detach().clone()
    for _ in range(10):
        layer.merge()
        assert layer.weight is not weight
        assert layer.merged
        assert layer.can_unmerge
        assert layer.kept_parameters["weight"] is weight
        assert not layer.weight.requires_grad
        assert torch.equal(weight, bits)
        layer.unmerge()
        assert not layer.merged
        assert not layer.kept_parameters
    assert layer.weight is weight
    assert torch.equal(weight, bits)


def test_a_merged_layer_computes_the_same(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    x = torch.randn(5, 6, dtype=dtype)
    before = layer(x)
    layer.merge()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    assert repr(layer).endswith("dropout=0, merged)")


@given(
    fan_in=st.integers(1, 9),
    fan_out=st.integers(1, 9),
    rank=st.integers(1, 12),
    rows=st.integers(0, 5),
    scaling=st.floats(-4, 4),
    bias=st.booleans(),
)
def test_merged_and_unmerged_agree_for_every_shape(
    fan_in: int, fan_out: int, rank: int, rows: int, scaling: float, bias: bool
) -> None:
    layer = adapted(fan_in, fan_out, bias=bias, dtype=torch.float64, rank=rank, scaling=scaling)
    x = torch.randn(rows, fan_in, dtype=torch.float64)
    expected = F.linear(x, weight_by_hand(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        layer.delta_weight(), scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    )
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_delta_weight_is_accumulated_in_a_wide_dtype() -> None:
    layer = adapted(dtype=torch.bfloat16)
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype is torch.bfloat16
    delta = layer.delta_weight()
    assert delta.dtype is torch.float32
    assert not delta.requires_grad
    expected = 0.5 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-6)
    assert adapted(dtype=torch.float64).delta_weight().dtype is torch.float64


def test_tied_weights_stay_as_they_are() -> None:
    embedding, linear = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    linear.weight = embedding.weight
    layer = LoRALinear.from_linear(linear)
    nn.init.normal_(layer.lora_B)
    bits = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, bits)
    assert not torch.equal(layer.weight, bits)
    layer.unmerge()
    assert layer.weight is embedding.weight


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors() -> None:
    layer = adapted()
    with pytest.raises(AdapterStateError, match="is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(AdapterStateError, match=r"merged already.*unmerge\(\) first"):
        layer.merge()
    layer.unmerge()
    layer.merge(keep_base=False)
    assert not layer.can_unmerge
    with pytest.raises(AdapterStateError, match="keep_base=False"):
        layer.unmerge()


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_merged(name: str, value: float) -> None:
    layer = adapted()
    with torch.no_grad():
        getattr(layer, name)[1, 2] = value
    weight = layer.weight
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity"):
        layer.merge()
    assert layer.weight is weight
    assert not layer.merged
    layer.merge(safe=False)
    assert not layer.weight.isfinite().all()


def test_a_sum_out_of_range_is_not_merged() -> None:
    layer = adapted(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A.fill_(300.0)
        layer.lora_B.fill_(300.0)
    with pytest.raises(NonFiniteError, match=r"exceeds the range of torch\.float16"):
        layer.merge()
    assert not layer.merged
