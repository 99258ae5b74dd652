"""Experts of transformers with adapters, however it computes them, against weights by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext.adapters.low_rank_sum import LowRankSum
from gauge_ext.models import lora_layers

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]
SCALING = 2.0


def build(name: str, way: str, dtype: torch.dtype) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    config._experts_implementation = way
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def by_hand(base: nn.Module, model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            holder, _, child = path.rpartition(".")
            stack = getattr(twin.get_submodule(holder), child.removeprefix("lora_"))
            count = stack.shape[0]
            for e in range(count):
                for k in range(4):
                    column, row = layer.lora_B[:, k * count + e], layer.lora_A[e * 4 + k]
                    stack[e] += SCALING * torch.outer(column, row)
    return twin


@pytest.mark.parametrize("name", MODELS)
# torch's grouped product knows no float64.
@pytest.mark.parametrize(
    ("way", "dtype"),
    [("eager", torch.float64), ("batched_mm", torch.float64), ("grouped_mm", torch.float32)],
)
def test_by_the_factors_alone(
    name: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(name, way, dtype)
    model = copy.deepcopy(base)
    config = gauge_ext.LoRAConfig(rank=4, alpha=8, target_modules=[], target_parameters=NAMES)
    gauge_ext.attach(model, config)
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    expected_model = by_hand(base, model)
    ids = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
    close = 1e-10 if dtype == torch.float64 else 1e-4

    def formed(self: LowRankSum) -> Tensor:
        raise AssertionError("the sum was formed")

    monkeypatch.setattr(LowRankSum, "dense", formed)
    found, expected = model(ids).logits, expected_model(ids).logits
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert (found - base(ids).logits).abs().max() > 1e-2

    # The gradient of the factors is that of the summed weights, by the chain rule written out.
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    for path, layer in lora_layers(model).items():
        holder, _, child = path.rpartition(".")
        dense = getattr(expected_model.get_submodule(holder), child.removeprefix("lora_")).grad
        count = dense.shape[0]
        for e in range(count):
            for k in range(4):
                column, row = layer.lora_B[:, k * count + e], layer.lora_A[e * 4 + k]
                of_row = SCALING * dense[e].T @ column
                of_column = SCALING * dense[e] @ row
                for ours, by_chain in (
                    (layer.lora_A.grad[e * 4 + k], of_row),
                    (layer.lora_B.grad[:, k * count + e], of_column),
                ):
                    torch.testing.assert_close(ours, by_chain, rtol=close * 10, atol=close * 10)


def test_compiled_it_is_the_same() -> None:
    model = build("Mixtral", "grouped_mm", torch.float32)
    config = gauge_ext.LoRAConfig(rank=4, alpha=8, target_modules=[], target_parameters=NAMES)
    gauge_ext.attach(model, config)
    for parameter in gauge_ext.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    found = torch.compile(model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
