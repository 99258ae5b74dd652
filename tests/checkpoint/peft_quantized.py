"""Rows of quantized linear layers."""

from __future__ import annotations

import torch
from row_by_hand import TWO, Row, Tensors, numbers
from torch import nn


def in_eight_bits() -> nn.Module:
    """A linear layer of torchao's, int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh())
    quantize_(model, Int8WeightOnlyConfig())
    return model


def in_four_bits() -> nn.Module:
    """A linear layer of bitsandbytes', nf4 weights."""
    import bitsandbytes

    linear = nn.Linear(64, 16)
    layer = bitsandbytes.nn.Linear4bit(64, 16, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    model = nn.Sequential(layer.to("cpu"), nn.Tanh())
    model.is_loaded_in_4bit = True  # what transformers leaves for PEFT to know it by
    return model


def add_decoded(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on the weight that the library says it is, as an ordinary layer."""
    weight = model[0].weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        decoded = dequantize_4bit(weight.data, weight.quant_state)
    else:
        decoded = weight.dequantize()
    total = decoded.double() + s * t["0.lora_B.weight"] @ t["0.lora_A.weight"]
    plain = nn.Linear(64, 16)
    plain.weight.copy_(total)
    plain.bias.copy_(model[0].bias)
    model[0] = plain


QUANTIZED = [
    *(
        Row(
            f"Linear, {name}",
            make,
            numbers(3, 64, dtype=torch.float32),
            {**TWO, "target_modules": ["0"]},
            add_decoded,
            dtype=torch.float32,
        )
        for name, make in (("torchao int8", in_eight_bits), ("bitsandbytes nf4", in_four_bits))
    ),
]
