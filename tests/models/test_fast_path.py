"""An adapter inside torch's own encoder counts in evaluation too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.models import adapter_parameters, attach, detach, lora_layers, merged_copy


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


def merged_by_hand(base: nn.Module, adapted: nn.Module) -> nn.Module:
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in lora_layers(adapted).items():
            update = layer.scaling * layer.lora_B @ layer.lora_A
            twin.get_submodule(name).weight.add_(update)
    return twin


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_adapter_is_not_overlooked(wrapped: bool, grad: bool, masked: bool) -> None:
    base = nn.ModuleDict({"inner": encoder()}) if wrapped else encoder()
    model = attach(copy.deepcopy(base), LoRAConfig(target_modules=["linear1", "linear2"], rank=2))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])

    def run(module: nn.Module) -> Tensor:
        inner = module["inner"] if wrapped else module
        with torch.set_grad_enabled(grad):
            y = inner(x, src_key_padding_mask=padding if masked else None)
        # Where the input is padding, the fused path gives zeros and the ordinary one does not.
        return y[~padding] if masked else y

    before = run(base)
    expected = run(merged_by_hand(base, model))
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(merged_copy(model)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(detach(model)), before)


def test_the_switches_come_back() -> None:
    model = encoder()
    model.layers[1].activation_relu_or_gelu = 2
    before = (model.use_nested_tensor, *(m.activation_relu_or_gelu for m in model.layers))
    assert before == (True, 1, 2)

    def now(module: nn.Module) -> tuple[object, ...]:
        return (module.use_nested_tensor, *(m.activation_relu_or_gelu for m in module.layers))

    # One layer alone is adapted: the other keeps its fused path.
    attach(model, LoRAConfig(target_modules=["layers.1.linear1"]))
    assert now(model) == (False, 1, 0)
    assert now(merged_copy(model)) == before
    assert now(model) == (False, 1, 0)
    assert now(detach(model)) == before
