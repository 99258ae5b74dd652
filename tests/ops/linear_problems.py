"""Layers of many sizes for ``lora_linear``, and its formulas in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

# (N, in, out, r): tails of every tile, wide and narrow, one row, no row, rank one, rank over a
# tile, so many rows that chunks and merging come in
SIZES = [
    (7, 37, 51, 5),
    (64, 384, 384, 8),
    (1, 128, 130, 4),
    (33, 1000, 260, 17),
    (5, 3, 2, 1),
    (0, 8, 8, 2),
    (600, 40, 24, 3),
]


DTYPES = [
    (torch.float64, torch.float64, 1e-13),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
]


@dataclass
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    grad: Tensor
    scaling: float = 0.7

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.lora_A, self.lora_B


def make(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
) -> Problem:
    rows, in_features, out_features, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=normal(rows, in_features, dtype=dtype).requires_grad_(),
        weight=normal(out_features, in_features, dtype=dtype),
        bias=normal(out_features, dtype=dtype),
        lora_A=normal(rank, in_features, dtype=adapter_dtype).requires_grad_(),
        lora_B=normal(out_features, rank, dtype=adapter_dtype).requires_grad_(),
        grad=normal(rows, out_features, dtype=dtype),
    )


def by_hand(p: Problem, mask: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and the gradients of x, lora_A and lora_B, all in float64, from the formulas."""
    x, weight, bias, lora_A, lora_B, grad = (
        t.detach().double() for t in (p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.grad)
    )
    s, dropped = p.scaling, x * mask
    y = x @ weight.T + bias + s * (dropped @ lora_A.T @ lora_B.T)
    grad_x = grad @ weight + s * (grad @ lora_B @ lora_A) * mask
    grad_A = s * (grad @ lora_B).T @ dropped
    grad_B = s * grad.T @ (dropped @ lora_A.T)
    return y, grad_x, grad_A, grad_B
