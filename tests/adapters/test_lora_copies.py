"""Copies, files and conversions of an adapted layer, merged or not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from lora_layers import adapted
from torch import nn

from gauge_ext.adapters import LoRALinear


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(merged: bool, way: str) -> None:
    layer = adapted(dropout=0.1).eval()
    x = torch.randn(5, 6)
    unmerged_output = layer(x)
    base_bits = layer.weight.detach().clone()
    if merged:
        layer.merge()
    expected = layer(x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is LoRALinear
    assert torch.equal(twin(x), expected)
    assert (twin.merged, twin.scaling, twin.dropout_p) == (merged, 0.5, 0.1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)
    if merged:
        twin.unmerge()
        assert torch.equal(twin.weight, base_bits)
        layer.unmerge()
    assert torch.equal(layer(x), unmerged_output)


def test_state_dicts_of_the_base_and_of_the_layer_load() -> None:
    layer, other = adapted(), adapted()
    x = torch.randn(5, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    base = nn.Linear(6, 4)
    result = other.load_state_dict(base.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A", "lora_B"]
    assert torch.equal(other.weight, base.weight)
    assert torch.equal(other.lora_A, layer.lora_A)


@pytest.mark.parametrize("source_merged", [False, True])
@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_merged_weight_is_never_counted_twice(
    source_merged: bool, target_merged: bool, through_file: bool
) -> None:
    source, target = nn.Sequential(adapted()), nn.Sequential(adapted())
    if source_merged:
        source[0].merge()
    if target_merged:
        target[0].merge()
    state = source.state_dict()
    if through_file:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer)
    if not source_merged and not target_merged:
        target.load_state_dict(state)
        return
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=r"'0' holds a merged weight; call gauge_ext\.unmerge"):
        target.load_state_dict(state)
    after = target.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    # A state dict that says nothing of this layer concerns it not.
    target.load_state_dict({}, strict=False)


def test_conversion_takes_the_kept_base_along() -> None:
    layer = adapted()
    bits = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.float64)
    assert layer.weight.dtype is layer.lora_A.dtype is torch.float64
    layer.unmerge()
    assert layer.weight.dtype is torch.float64
    assert torch.equal(layer.weight, bits.double())
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert layer.weight.is_meta


def test_conversion_of_a_tied_kept_base_keeps_the_tie() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    layer = LoRALinear.from_linear(model["head"])
    layer.merge()
    model.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight is model["embedding"].weight
    assert layer.weight.dtype is torch.bfloat16
