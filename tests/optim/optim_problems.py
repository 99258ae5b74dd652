"""Small models whose adapters can be put into any gauge, and a run of training on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext import LoRAConfig, attach
from gauge_ext.optim import create_optimizer, factor_pairs

F64 = torch.float64
RANK = 4


def gauge(condition: float, seed: int = 7, rank: int = RANK) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 0.5 * torch.tensor(condition).log10().item()
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=F64)).Q for _ in "lr"
    )
    return left * torch.logspace(-half, half, rank, dtype=F64) @ right


def model(
    *, zero: bool = True, alpha: float = 8.0, g: Tensor | None = None, dtype: torch.dtype = F64
) -> nn.Module:
    """An MLP with adapters; the same function whatever ``alpha`` and ``g`` are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    attach(net, LoRAConfig(rank=RANK, alpha=alpha))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in factor_pairs(net):
            if not zero:
                b = torch.randn(pair.lora_B.shape, generator=generator, dtype=F64)
                pair.lora_B.copy_(0.4 * b / pair.scaling)
            if g is not None:
                pair.lora_B.copy_(torch.linalg.solve(g, pair.lora_B, left=False))
                pair.lora_A.copy_(g @ pair.lora_A)
    return net.to(dtype)


def updates(net: nn.Module) -> Tensor:
    """All s·B·A in one vector, by hand."""
    parts = [
        pair.scaling * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
        for pair in factor_pairs(net)
    ]
    return torch.cat([part.flatten() for part in parts])


def loss_of(net: nn.Module, step: int) -> Tensor:
    """The loss of a batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    dtype = next(net.parameters()).dtype
    x = torch.randn(32, 14, generator=generator, dtype=F64).to(dtype)
    y = torch.sin(x.double() @ torch.linspace(-1, 1, 84, dtype=F64).view(14, 6)).to(dtype)
    return (net(x) - y).square().mean()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, first: int = 0
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def run(name: Any, options: dict[str, Any], **how: Any) -> Tensor:
    net = model(**how)
    train(net, create_optimizer(net, name, **options))
    return updates(net)


def difference(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


Make = Callable[[nn.Module], torch.optim.Optimizer]
