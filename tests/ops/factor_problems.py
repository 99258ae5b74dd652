"""Factor pairs of many shapes in any gauge, with gradients, for the optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64
SHAPES = ((37, 29, 5), (64, 48, 8), (9, 9, 1), (80, 150, 64), (70, 300, 17), (5, 7, 5))
LOOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-3, F64: 1e-11}


@dataclass
class Problem:
    """Pairs in a gauge of a given condition, with gradients of a loss that is linear in X."""

    A: list[Tensor]
    B: list[Tensor]
    grad_A: list[Tensor]
    grad_B: list[Tensor]
    scaling: list[float]
    dense: list[Tensor]
    anchors: list[int]

    @property
    def parts(self) -> tuple[list[Tensor], ...]:
        return self.A, self.B, self.grad_A, self.grad_B

    def updates(self) -> list[Tensor]:
        return [
            s * b.double() @ a.double()
            for a, b, s in zip(self.A, self.B, self.scaling, strict=True)
        ]

    def state(self) -> dict[str, list[Tensor]]:
        dtype = F64 if self.A[0].dtype == F64 else torch.float32
        return {
            "avg_A": [0.1 * g.to(dtype) for g in self.grad_A],
            "avg_B": [0.2 * g.to(dtype) for g in self.grad_B],
            "sq_A": [torch.ones(a.shape[1], dtype=dtype) for a in self.A],
            "sq_B": [torch.ones(b.shape[0], dtype=dtype) for b in self.B],
        }


def make(
    dtype: torch.dtype, condition: float = 30.0, *, zero: bool = False, shapes: Any = SHAPES
) -> Problem:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    p = Problem([], [], [], [], [], [], [0] * len(shapes))
    for m, n, r in shapes:
        half = 0.5 * torch.tensor(condition).log10().item()
        scales = torch.logspace(-half, half, r, dtype=F64)
        left, right = torch.linalg.qr(normal(r, r)).Q, torch.linalg.qr(normal(r, r)).Q
        b = torch.zeros(m, r, dtype=F64) if zero else normal(m, r)
        s = 1.7
        a, b = ((left * scales) @ right @ normal(r, n)), b @ ((right.mT / scales) @ left.mT) / s
        a, b = a.to(dtype), b.to(dtype)
        g = normal(m, n)
        p.A.append(a)
        p.B.append(b)
        p.grad_A.append((s * b.double().mT @ g).to(dtype))
        p.grad_B.append((s * g @ a.double().mT).to(dtype))
        p.scaling.append(s)
        p.dense.append(g)
    return p


def relative(got: list[Tensor], want: list[Tensor]) -> float:
    return max(
        float(torch.linalg.norm(x.double() - y.double()) / torch.linalg.norm(y.double()))
        for x, y in zip(got, want, strict=True)
    )
