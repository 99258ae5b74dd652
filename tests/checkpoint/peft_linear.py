"""Rows of linear layers, of transformers' Conv1D too, and of what is trained whole beside them."""

from __future__ import annotations

import torch
from row_by_hand import TWO, Row, Tensors, numbers, tokens
from torch import Tensor, nn


def add_linear(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on each linear layer, with DoRA's lengths and the branch's bias where given."""
    for key in [key for key in t if key.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        layer = model.get_submodule(path)
        transposed = type(layer).__name__ == "Conv1D"
        weight = layer.weight.T if transposed else layer.weight
        total = weight + s * t[f"{path}.lora_B.weight"] @ t[key]
        gain = torch.ones(total.shape[0], dtype=total.dtype)
        if (m := t.get(f"{path}.lora_magnitude_vector")) is not None:
            gain = m / total.norm(dim=1)
        total = total * gain[:, None]
        if (shift := t.get(f"{path}.lora_B.bias")) is not None:
            layer.bias += s * gain * shift
        layer.weight = nn.Parameter(total.T if transposed else total)


def add_whole(model: nn.Module, t: Tensors, s: float) -> None:
    """The sum on linear layers; every other tensor of the file replaces a parameter."""
    add_linear(model, t, s)
    for key, value in t.items():
        if ".lora_" not in key:
            model.get_parameter(key.replace(".base_layer", "")).copy_(value)


class MLP(nn.Module):
    """Two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.up(x))))


def gpt2() -> nn.Module:
    """A tiny GPT-2, of transformers' Conv1D."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4
    )
    return GPT2Model(config)


_UP = {**TWO, "target_modules": ["up", "head"]}


LINEAR = [
    Row("Linear", MLP, numbers(3, 6), _UP, add_linear),
    Row("rsLoRA", MLP, numbers(3, 6), {**_UP, "use_rslora": True}, add_linear, scaling=1.0),
    Row("DoRA, Linear", MLP, numbers(3, 6), {**_UP, "use_dora": True}, add_linear),
    Row("lora_bias, Linear", MLP, numbers(3, 6), {**_UP, "lora_bias": True}, add_linear),
    Row(
        "modules_to_save",
        MLP,
        numbers(3, 6),
        {**TWO, "target_modules": ["up"], "modules_to_save": ["head"]},
        add_whole,
    ),
    Row(
        'bias="lora_only"',
        MLP,
        numbers(3, 6),
        {**TWO, "target_modules": ["up"], "bias": "lora_only"},
        add_whole,
    ),
    Row(
        'bias="all"',
        MLP,
        numbers(3, 6),
        {**TWO, "target_modules": ["up"], "bias": "all"},
        add_whole,
    ),
    Row(
        "transformers Conv1D",
        gpt2,
        tokens(20, 2, 5),
        {**TWO, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        add_linear,
    ),
    Row(
        "DoRA, Conv1D",
        gpt2,
        tokens(20, 2, 5),
        {**TWO, "target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True},
        add_linear,
    ),
]
