"""An adapted layer among torch's tools: parametrized, called functionally, compiled, exported."""

from __future__ import annotations

import pytest
import torch
from lora_layers import adapted, branch_identity, weight_by_hand
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.mark.parametrize("target", ["lora_A", "weight"])
def test_parametrised_and_pruned_factors_count(target: str) -> None:
    from torch.nn.utils import prune

    x = torch.randn(5, 6, dtype=torch.float64)
    pruned = adapted(dtype=torch.float64)
    prune.l1_unstructured(pruned, target, amount=3)
    torch.testing.assert_close(pruned(x), F.linear(x, weight_by_hand(pruned), pruned.bias))

    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = adapted(dtype=torch.float64)
    before = getattr(layer, target).detach().clone()
    nn.utils.parametrize.register_parametrization(layer, target, Twice())
    assert torch.equal(getattr(layer, target), 2 * before)
    torch.testing.assert_close(layer(x), F.linear(x, weight_by_hand(layer), layer.bias))


def test_functional_call_uses_the_tensors_that_it_is_given() -> None:
    layer = adapted(dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    a = torch.randn_like(layer.lora_A)
    y = torch.func.functional_call(layer, {"lora_A": a}, x)
    expected = layer.weight + 0.5 * layer.lora_B @ a
    torch.testing.assert_close(y, F.linear(x, expected, layer.bias))


def test_autocast_gives_the_dtype_that_a_plain_layer_gives() -> None:
    layer = adapted()
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        plain = nn.Linear(6, 4)(x)
    assert y.dtype is plain.dtype is torch.bfloat16
    expected = F.linear(x, weight_by_hand(layer).float(), layer.bias)
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)


def test_compiled_it_is_one_graph_through_merging_and_training() -> None:
    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, torch.compile(layer, fullgraph=True)(x), g)
    layer.eval()
    # What is traced again when the layer changes is not the C++ compiler's matter, which is slow.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = F.linear(x, weight_by_hand(layer), layer.bias)
    torch.testing.assert_close(compiled(x), expected)
    layer.merge()
    torch.testing.assert_close(compiled(x), expected)
    layer.unmerge()
    torch.testing.assert_close(compiled(x), expected)


def test_exported_it_keeps_its_names() -> None:
    layer = adapted().eval()
    x = torch.randn(5, 6)
    program = torch.export.export(layer, (x,))
    assert sorted(program.state_dict) == ["bias", "lora_A", "lora_B", "weight"]
    torch.testing.assert_close(program.module()(x), layer(x))
