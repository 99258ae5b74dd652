"""Gauge fields over bases of several kinds, and their update by hand."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gauge_ext import LoRAGaugeField

TIGHT = {torch.float64: 1e-11, torch.float32: 1e-3}


class SeedBase(nn.Module):
    """What the seed calls base_model: something with dim, weight and a forward."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Transposed(SeedBase):
    """Its weight acts from the other side, so W + phi A would be wrong in it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Curved(SeedBase):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class OnlyDim(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.inner = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def trained(base: nn.Module, rank: int = 3, scaling: float = 1.0) -> LoRAGaugeField:
    field = LoRAGaugeField(base, rank, scaling=scaling)
    nn.init.normal_(field.gauge_field["phi"], std=0.4)
    nn.init.normal_(field.gauge_field["A"], std=0.4)
    return field


def field_of(
    m: int, n: int, rank: int, seed: int, dtype: torch.dtype, scaling: float = 1.0
) -> LoRAGaugeField:
    torch.manual_seed(seed)
    return trained(nn.Linear(n, m, dtype=dtype), rank, scaling)


def update(field: LoRAGaugeField) -> Tensor:
    """S phi A in float64, by hand."""
    phi, a = field.gauge_field["phi"].detach(), field.gauge_field["A"].detach()
    return field.scaling * phi.double() @ a.double()


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


SHAPES = st.tuples(st.integers(3, 20), st.integers(3, 20), st.integers(1, 3))


SEEDS = st.integers(0, 10**6)


DTYPES = st.sampled_from([torch.float64, torch.float32])
