"""A small adapted layer, its weight by hand, and what its gradients must satisfy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import LoRALinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def adapted(
    fan_in: int = 6,
    fan_out: int = 4,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LoRALinear:
    """A layer whose two factors both matter."""
    linear = nn.Linear(fan_in, fan_out, bias, dtype=dtype)
    layer = LoRALinear.from_linear(linear, **{"rank": 3, "scaling": 0.5, **options})
    nn.init.normal_(layer.lora_B)
    return layer


def weight_by_hand(layer: LoRALinear) -> Tensor:
    """``W + s·B·A`` in float64."""
    b, a = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    return layer.weight.detach().double() + layer.scaling * (b @ a)


def branch_identity(layer: LoRALinear, x: Tensor, y: Tensor, g: Tensor) -> None:
    """Check gradients against the very mask that made ``y``.

    The branch is linear in A and in B, so by Euler's identity <dA, A> = <dB, B> = <g, y - base>:
    it holds only if the backward pass sees the mask of the forward pass.
    """
    base = F.linear(x, layer.weight, layer.bias).detach()
    expected = (g * (y.detach() - base)).sum()
    y.backward(g)
    for factor in (layer.lora_A, layer.lora_B):
        assert factor.grad is not None
        torch.testing.assert_close((factor.grad * factor.detach()).sum(), expected)
        factor.grad = None
