"""Embeddings and convolutions: trained alike in every gauge, whichever factor starts at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import F64, difference, gauge
from torch import Tensor, nn

from gauge_ext import LoRAConfig, attach
from gauge_ext.optim import create_optimizer, factor_pairs

RANK = 3


class Words(nn.Module):
    """An embedding, and a convolution over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.embed(ids)).mT)


def trained(name: Any, lr: float, *, zero: str, g: Tensor | None) -> Tensor:
    """Every s·B·A after ten steps, in one vector."""
    torch.manual_seed(0)
    model = Words().double()
    attach(model, LoRAConfig(rank=RANK, alpha=6, target_modules=["embed", "conv"]))
    with torch.no_grad():
        for pair in factor_pairs(model):
            drawn = pair.lora_B if zero == "lora_A" else pair.lora_A
            pair.lora_A.zero_()
            pair.lora_B.zero_()
            drawn.normal_(std=0.5)
            if g is not None:
                a, b = pair.lora_A.flatten(1), pair.lora_B.flatten(1)
                pair.lora_A.copy_((g @ a).view_as(pair.lora_A))
                pair.lora_B.copy_(torch.linalg.solve(g, b, left=False).view_as(pair.lora_B))
    optimizer = create_optimizer(model, name, lr=lr)
    assert len(factor_pairs(model)) == 2
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        ids = torch.randint(11, (5, 8), generator=generator)
        optimizer.zero_grad()
        (model(ids) - 1).square().mean().backward()
        optimizer.step()
    pairs = factor_pairs(model)
    products = [p.lora_B.detach().flatten(1) @ p.lora_A.detach().flatten(1) for p in pairs]
    return torch.cat([product.flatten() for product in products])


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("name", "lr"), [("scaled_gd", 0.3), ("gauge_adam", 0.02), ("lora_rite", 0.02)]
)
def test_the_same_in_every_gauge(name: str, lr: float, zero: str) -> None:
    want = trained(name, lr, zero=zero, g=None)
    assert all(bool(part.any()) for part in want.split([66, 72]))  # both layers moved
    for g in (gauge(100.0, rank=RANK), 10 * torch.eye(RANK, dtype=F64)):
        assert difference(trained(name, lr, zero=zero, g=g), want) < 1e-9


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_adamw_depends_on_the_gauge(zero: str) -> None:
    want = trained("adamw", 0.02, zero=zero, g=None)
    assert difference(trained("adamw", 0.02, zero=zero, g=gauge(100.0, rank=RANK)), want) > 0.1
