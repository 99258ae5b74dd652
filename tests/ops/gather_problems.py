"""Rows with an adapter each for ``lora_gather``, and its formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gauge_ext.ops import lora_gather

RANKS = (4, 1, 9, 3)
SCALING = (0.5, -1.0, 0.25, 2.0)


class Problem:
    def __init__(
        self,
        index: Sequence[int],
        sizes: tuple[int, int] = (37, 51),
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        batch: tuple[int, ...] = (),
    ) -> None:
        generator = torch.Generator().manual_seed(len(index))
        inner, out = sizes

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.index = torch.tensor(index, dtype=torch.int64)
        self.x = normal(len(index), *batch, inner, dtype=dtype).requires_grad_()
        self.weight = normal(out, inner, dtype=dtype)
        self.bias = normal(out, dtype=dtype)
        narrow = factors or dtype
        self.lora_A = [normal(r, inner, dtype=narrow).requires_grad_() for r in RANKS]
        self.lora_B = [normal(out, r, dtype=narrow).requires_grad_() for r in RANKS]
        self.grad = normal(len(index), *batch, out, dtype=dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.lora_A, *self.lora_B]

    def run(self) -> Tensor:
        return lora_gather(
            self.x, self.weight, self.bias, self.lora_A, self.lora_B, SCALING, self.index
        )

    def by_hand(self) -> list[Tensor]:
        """Return y and every gradient, adapter by adapter in float64."""
        x, weight, bias, grad = (
            t.detach().double() for t in (self.x, self.weight, self.bias, self.grad)
        )
        a = [t.detach().double() for t in self.lora_A]
        b = [t.detach().double() for t in self.lora_B]
        y, grad_x = x @ weight.T + bias, grad @ weight
        grads_A, grads_B = [torch.zeros_like(t) for t in a], [torch.zeros_like(t) for t in b]
        for i in set(self.index.tolist()) - {-1}:
            own = self.index == i
            rows, given = x[own].reshape(-1, x.shape[-1]), grad[own].reshape(-1, grad.shape[-1])
            delta = SCALING[i] * b[i] @ a[i]
            y[own] += x[own] @ delta.T
            grad_x[own] += grad[own] @ delta
            grads_A[i] = SCALING[i] * b[i].T @ given.T @ rows
            grads_B[i] = SCALING[i] * given.T @ rows @ a[i].T
        return [y, grad_x, *grads_A, *grads_B]
