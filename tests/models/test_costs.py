"""What an adapted layer costs in operators called and bytes kept: both are exact."""

from __future__ import annotations

import pytest
import torch
from called_operators import Calls
from torch import Tensor, nn

import gauge_ext
from gauge_ext import _load

pytestmark = pytest.mark.skipif(
    not _load.status().compiled, reason="counts the compiled ops; nothing compiled is loaded"
)

ROWS, WIDTH, RANK = 24, 16, 4


def adapted(dropout: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    config = gauge_ext.LoRAConfig(rank=RANK, dropout=dropout, target_modules=["0"])
    return gauge_ext.attach(model, config).train()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_its_input_and_the_narrow_product(dropout: float) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    seed = 8 if dropout else 0
    assert kept_bytes(adapted(dropout), x) == 4 * ROWS * (WIDTH + RANK) + seed


def test_two_layers_that_read_one_tensor_keep_it_once() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    both = nn.ModuleList([adapted(0.0), adapted(0.0)])

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor) -> Tensor:
            return self.both[0](x) + self.both[1](x)

    assert kept_bytes(Sum(), x) == 4 * ROWS * (WIDTH + 2 * RANK)


def test_a_step_calls_one_operator_each_way() -> None:
    layer, x = adapted(0.0)[0], torch.randn(ROWS, WIDTH, requires_grad=True)
    with Calls() as calls:
        y = layer(x)
    assert calls.names == ["gauge_ext.lora_linear_forward.default"]
    grad = torch.ones_like(y)
    with Calls() as calls:
        torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), grad)
    compute = [name for name in calls.names if "detach" not in name]
    assert compute == ["gauge_ext.lora_linear_backward.default"]


def test_an_evaluation_calls_one_operator() -> None:
    layer, x = adapted(0.1)[0].eval(), torch.randn(ROWS, WIDTH)
    with torch.no_grad(), Calls() as calls:
        layer(x)
    assert calls.names == ["gauge_ext.lora_linear.default"]
