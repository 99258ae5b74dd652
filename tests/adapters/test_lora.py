"""The adapted layer: its numbers by hand, and how a plain layer becomes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_layers import TOLERANCE, adapted, weight_by_hand
from torch import nn

from gauge_ext.adapters import LoRALinear
from gauge_ext.errors import ConfigError, TargetError


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_forward_by_hand(dtype: torch.dtype, bias: bool, batch: tuple[int, ...]) -> None:
    layer = adapted(bias=bias, dtype=dtype)
    x = torch.randn(*batch, 6, dtype=dtype)
    y = layer(x)
    expected = x.double() @ weight_by_hand(layer).T
    if bias:
        expected = expected + layer.bias.detach().double()
    assert y.dtype is dtype
    assert y.shape == (*batch, 4)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_backward_by_hand(dtype: torch.dtype) -> None:
    layer = adapted(dtype=dtype)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    g = torch.randn(5, 4, dtype=dtype)
    layer(x).backward(g)
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    gd, xd = g.double(), x.detach().double()
    tolerance = TOLERANCE[dtype]
    for got, expected in (
        (layer.lora_A.grad, 0.5 * (gd @ b).T @ xd),
        (layer.lora_B.grad, 0.5 * gd.T @ (xd @ a.T)),
        (x.grad, gd @ weight_by_hand(layer)),
    ):
        assert got is not None
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert layer.weight.grad is None


def test_a_half_precision_base_gets_float32_factors_and_others_their_own() -> None:
    for base, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = LoRALinear.from_linear(nn.Linear(4, 3, dtype=base))
        assert layer.lora_A.dtype is layer.lora_B.dtype is expected
    layer = LoRALinear.from_linear(nn.Linear(4, 3, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert layer.lora_A.dtype is torch.bfloat16


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_changes_nothing(init: Any) -> None:
    linear = nn.Linear(300, 200)
    x = torch.randn(7, 300)
    before = linear(x)
    layer = LoRALinear.from_linear(linear, rank=16, scaling=3.0, init=init)
    assert not layer.lora_B.any()
    assert not layer.delta_weight().any()
    # The kernels sum a product of few rows in an order of their own: the rounding may differ.
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)
    a = layer.lora_A.detach()
    if init == "gaussian":
        assert abs(a.std().item() - 1 / 16) < 0.1 / 16
        assert abs(a.mean().item()) < 0.02 / 16
    else:
        bound = 300**-0.5
        assert 0.99 * bound < a.abs().max() <= bound
        assert abs(a.std().item() - bound / 3**0.5) < 0.05 * bound


def test_it_is_the_same_object_with_the_same_names() -> None:
    linear = nn.Linear(4, 3)
    weight, bias = linear.weight, linear.bias
    bias.requires_grad_(False)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.from_linear(linear, rank=2)
    assert layer is linear
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert layer.bias is bias
    assert (weight.requires_grad, bias.requires_grad) == (True, False)
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    layer(torch.zeros(1, 4))
    assert calls == [1]
    assert layer.rank == 2
    assert repr(layer).endswith("bias=True, rank=2, scaling=1, dropout=0)")
    back = layer.to_base()
    assert back is linear
    assert type(back) is nn.Linear
    assert list(back.state_dict()) == ["weight", "bias"]
    assert set(vars(back)) == set(vars(nn.Linear(4, 3)))


def test_it_can_be_made_directly() -> None:
    layer = LoRALinear(4, 3, bias=False, rank=2, scaling=1.5, dropout=0.25, dtype=torch.bfloat16)
    assert layer.lora_A.shape == (2, 4)
    assert layer.lora_B.shape == (3, 2)
    assert layer.lora_A.dtype is torch.float32
    assert (layer.scaling, layer.dropout_p, layer.merged, layer.bias) == (1.5, 0.25, False, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": float("nan")}, "dropout must lie"),
        ({"scaling": float("inf")}, "scaling must be a finite number, got inf"),
    ],
)
def test_a_failed_adoption_leaves_a_plain_layer(options: dict[str, Any], words: str) -> None:
    linear = nn.Linear(4, 3)
    with pytest.raises(ConfigError) as caught:
        LoRALinear.from_linear(linear, **options)
    assert words in str(caught.value)
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_what_cannot_carry_an_adapter_is_refused() -> None:
    with pytest.raises(TargetError, match=r"nn\.MultiheadAttention reads the weight"):
        LoRALinear.from_linear(nn.MultiheadAttention(4, 2).out_proj)
    with pytest.raises(TargetError, match="it has an adapter already"):
        LoRALinear.from_linear(adapted())
