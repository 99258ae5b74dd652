"""Layers of one input for ``lora_linear_group``, and its formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gauge_ext.ops import reference

# (N, in, ((out, r), ...)): grouped-query attention, one member, no row, merging and chunks
GROUPS: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [
    (7, 37, ((51, 5), (20, 3), (20, 5))),
    (1, 128, ((130, 4), (64, 4))),
    (33, 60, ((26, 17),)),
    (0, 8, ((8, 2), (4, 1))),
    (600, 40, ((24, 3), (40, 2), (9, 8))),
]


@dataclass
class Problem:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    grads: list[Tensor]
    seeds: list[Tensor]

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.x, *self.lora_As, *self.lora_Bs]

    def arguments(self, dropout_p: float = 0.0) -> tuple[Any, ...]:
        lists = (self.weights, self.biases, self.lora_As, self.lora_Bs, self.scalings)
        return (self.x, *lists, dropout_p, self.seeds)


def make(
    group: tuple[int, int, tuple[tuple[int, int], ...]] = (3, 4, ((5, 2), (2, 1))),
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
) -> Problem:
    rows, width, members = group
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    own = adapter_dtype or dtype
    return Problem(
        x=normal(rows, width).requires_grad_(),
        weights=[normal(out, width) for out, _ in members],
        biases=[None if i == 1 else normal(out) for i, (out, _) in enumerate(members)],
        lora_As=[normal(r, width, dtype=own).requires_grad_() for _, r in members],
        lora_Bs=[normal(out, r, dtype=own).requires_grad_() for out, r in members],
        scalings=[0.7 - 0.2 * i for i in range(len(members))],
        grads=[normal(rows, out) for out, _ in members],
        seeds=[torch.tensor(1234567890123456789 + i) for i in range(len(members))],
    )


def by_hand(p: Problem, dropout_p: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradients of :attr:`Problem.differentiable`, in float64."""
    x = p.x.detach().double()
    ys, grad_x, grad_As, grad_Bs = [], torch.zeros_like(x), [], []
    for i, s in enumerate(p.scalings):
        mask = reference.dropout_mask(*x.shape, dropout_p, p.seeds[i])
        weight, a, b, g = (
            t[i].detach().double() for t in (p.weights, p.lora_As, p.lora_Bs, p.grads)
        )
        bias = p.biases[i]
        y = x @ weight.T + s * ((x * mask) @ a.T @ b.T)
        ys.append(y if bias is None else y + bias.double())
        grad_x += g @ weight + s * (g @ b @ a) * mask
        grad_As.append(s * (g @ b).T @ (x * mask))
        grad_Bs.append(s * g.T @ ((x * mask) @ a.T))
    return ys, [grad_x, *grad_As, *grad_Bs]
