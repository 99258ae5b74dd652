"""Rows of weights that are bare parameters: of an attention, of experts, of a router."""

from __future__ import annotations

import torch
from peft_linear import add_linear
from row_by_hand import TWO, Row, Tensors, numbers
from torch import Tensor, nn


def add_attention(model: nn.Module, t: Tensors, s: float) -> None:
    """W + s B A on in_proj and out_proj of each attention, once."""
    for key in [k for k in t if k.endswith(".lora_A.weight") and ".base_layer." not in k]:
        path = key.removesuffix(".lora_A.weight")
        attention = model.get_submodule(path)
        attention.in_proj_weight += s * t[f"{path}.lora_B.weight"] @ t[key]
        inner = f"{path}.base_layer.out_proj"
        attention.out_proj.weight += s * t[f"{inner}.lora_B.weight"] @ t[f"{inner}.lora_A.weight"]


def add_experts(model: nn.Module, t: Tensors, s: float) -> None:
    """W_e + s B_e A_e on each expert: A by experts, B by directions; the outer wrapper is last."""
    add_linear(model, {key: value for key, value in t.items() if key.startswith("up.")}, s)
    places = {"experts": (model.experts, "last"), "experts.base_layer": (model.experts, "first")}
    places |= {"router": (model.router, "matrix")}
    for path, (holder, name) in places.items():
        if f"{path}.lora_A.weight" not in t:
            continue
        a, b, weight = (
            *(t[f"{path}.lora_{factor}.weight"] for factor in "AB"),
            getattr(holder, name),
        )
        count = 1 if weight.dim() == 2 else weight.shape[0]
        rank = a.shape[0] // count
        for e in range(count):
            delta = sum(torch.outer(b[:, k * count + e], a[e * rank + k]) for k in range(rank))
            one = weight if weight.dim() == 2 else weight[e]
            one += s * (delta.T if getattr(holder, "is_transposed", False) else delta)


class Attention(nn.Module):
    """Self-attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x)[0])


class Experts(nn.Module):
    """Two stacked layers of three experts, all of which answer."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.first = nn.Parameter(torch.randn(3, 8, 6))
        self.last = nn.Parameter(torch.randn(3, 5, 8))
        self.shift = nn.Parameter(torch.randn(3, 8))
        if transposed:
            self.first, self.last = (
                nn.Parameter(p.detach().mT.contiguous()) for p in (self.first, self.last)
            )

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        layout = "eio" if self.is_transposed else "eoi"
        hidden = torch.einsum(f"ni,{layout}->eno", x, self.first) + self.shift[:, None]
        return torch.einsum(f"ne,eni,{layout}->no", gates, torch.tanh(hidden), self.last)


class Mixture(nn.Module):
    """A linear layer, a router whose matrix is a bare parameter, and experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.router = Router()
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.experts(x, self.router(x))


class Router(nn.Module):
    """Weights of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.matrix.T, -1)


PARAMETERS = [
    Row(
        "MultiheadAttention",
        Attention,
        numbers(2, 5, 8),
        {**TWO, "target_modules": ["attn"]},
        add_attention,
        peft_is="the update of out_proj twice",
    ),
    Row(
        "target_parameters, experts and router",
        Mixture,
        numbers(4, 6),
        {
            **TWO,
            "target_modules": ["up"],
            "target_parameters": ["experts.first", "experts.last", "matrix"],
            "rank_pattern": {"first": 2},
            "alpha_pattern": {"first": 1},
        },
        add_experts,
    ),
    Row(
        "target_parameters, transposed, alone",
        lambda: Mixture(transposed=True),
        numbers(4, 6),
        {**TWO, "target_modules": [], "target_parameters": ["experts.last"]},
        add_experts,
    ),
]
