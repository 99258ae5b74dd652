"""Adapted convolutions in any memory format, their update added in one pass, by ``W + s·B·A``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from called_operators import Calls
from torch import Tensor, nn

from gauge_ext.adapters import AdapterSpec, adapt

KINDS = {
    "1d": (nn.Conv1d, (5,), torch.contiguous_format),
    "2d": (nn.Conv2d, (5, 4), torch.contiguous_format),
    "2d, channels last": (nn.Conv2d, (5, 4), torch.channels_last),
    "3d": (nn.Conv3d, (3, 4, 2), torch.contiguous_format),
    "3d, channels last": (nn.Conv3d, (3, 4, 2), torch.channels_last_3d),
}


def adapted(kind: str, **options: Any) -> tuple[Any, Tensor]:
    """A layer with drawn factors, and an input of two samples, in float64."""
    torch.manual_seed(1)
    build, sizes, memory_format = KINDS[kind]
    base = build(3, 6, 3, padding=1, dtype=torch.float64)
    layer = adapt(base, AdapterSpec(rank=2, scaling=1.5, **options)).to(memory_format=memory_format)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, *sizes, dtype=torch.float64).contiguous(memory_format=memory_format)
    return layer, x


def by_hand(layer: Any, x: Tensor) -> Tensor:
    update = layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
    weight = layer.weight + 1.5 * update.view_as(layer.weight)
    convolution = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[weight.dim()]
    return convolution(x, weight, layer.bias, padding=1)


@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_and_memory_format_as_without_adapter(kind: str) -> None:
    layer, x = adapted(kind)
    x.requires_grad_()
    y, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()  # torch keeps the format, but of float64 in 3d
    leaves, grad = (x, layer.lora_A, layer.lora_B), torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_without_a_batch(kind: str) -> None:
    layer, x = adapted(kind)
    torch.testing.assert_close(layer(x[0]), by_hand(layer, x)[0])


@pytest.mark.parametrize("kind", ["1d", "2d, channels last"])
def test_compiled(kind: str) -> None:
    layer, x = adapted(kind)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), by_hand(layer, x))


@pytest.mark.parametrize("kind", ["1d", "2d", "2d, channels last"])
def test_autocast(kind: str) -> None:
    layer, x = adapted(kind)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), by_hand(layer, x), atol=0.1, rtol=0.05)


def test_a_bias_of_the_adapter_is_scaled_with_it() -> None:
    layer, x = adapted("2d", lora_bias=True)
    nn.init.normal_(layer.lora_bias)
    shift = 1.5 * layer.lora_bias[:, None, None]
    torch.testing.assert_close(layer(x), by_hand(layer, x) + shift)


@pytest.mark.parametrize("kind", ["1d", "2d", "2d, channels last"])
def test_the_product_adds_to_the_base(kind: str) -> None:
    layer, x = adapted(kind)
    with Calls() as calls:
        layer(x)
    products = ("convolution", "baddbmm", "addmm", "mul", "add")
    found = [name.split(".")[1] for name in calls.names if name.split(".")[1] in products]
    assert found == ["convolution"] * 2 + ["addmm" if "last" in kind else "baddbmm"]
