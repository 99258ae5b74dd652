"""Random updates in random gauges, and how far two results are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.geometry import LoRAPoint

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Family:
    """Updates of one shape, to be combined."""

    m: int
    n: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    condition: float
    seed: int

    def points(self) -> list[LoRAPoint]:
        """Unrelated updates, each in a gauge of the condition."""
        generator = torch.Generator().manual_seed(self.seed)
        return [random_point(generator, self, rank) for rank in self.ranks]

    def weights(self) -> list[float]:
        """As many, of both signs and none near zero."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        sizes = 0.2 + torch.rand(len(self.ranks), generator=generator, dtype=F64)
        return [float(w) * (-1) ** i for i, w in enumerate(sizes)]


def random_point(generator: torch.Generator, family: Family, rank: int) -> LoRAPoint:
    b = torch.randn(family.m, rank, generator=generator, dtype=F64)
    a = torch.randn(rank, family.n, generator=generator, dtype=F64)
    point = LoRAPoint(b, a)
    return regauged(point, family.condition, generator).to(family.dtype)


def regauged(point: LoRAPoint, condition: float, generator: torch.Generator) -> LoRAPoint:
    """The same update with other factors: a gauge of random directions and this condition."""
    r, half = point.rank, 0.5 * math.log10(condition)

    def rotation() -> Tensor:
        return torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=F64)).Q

    scales = torch.logspace(-half, half, r, dtype=F64) if r > 1 else torch.ones(1, dtype=F64)
    gauge = rotation() @ torch.diag(scales) @ rotation()
    return LoRAPoint(point.B.double() @ gauge.inverse(), gauge @ point.A.double()).to(point.dtype)


def versions(
    seed: int, count: int, size: float, m: int = 30, n: int = 20, r: int = 4
) -> list[LoRAPoint]:
    """Neighbours of one update, each in a gauge of condition 100."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=generator, dtype=F64)
    a = torch.randn(r, n, generator=generator, dtype=F64)
    found = []
    for _ in range(count):
        near = LoRAPoint(
            b + size * torch.randn(m, r, generator=generator, dtype=F64),
            a + size * torch.randn(r, n, generator=generator, dtype=F64),
        )
        found.append(regauged(near, 100.0, generator))
    return found


def dense(point: LoRAPoint) -> Tensor:
    return point.B.double() @ point.A.double()


def dense_sum(points: Sequence[LoRAPoint], weights: Sequence[float]) -> Tensor:
    total = torch.zeros(points[0].shape, dtype=F64)
    for point, weight in zip(points, weights, strict=True):
        total += weight * dense(point)
    return total


def distance(found: LoRAPoint | Tensor, expected: Tensor) -> float:
    """Frobenius, over the norm of what was expected."""
    matrix = dense(found) if isinstance(found, LoRAPoint) else found
    return float((matrix - expected).norm() / expected.norm())


def families(
    dtype: torch.dtype = F64, condition: float = 600.0, most: int = 4
) -> st.SearchStrategy[Family]:
    """Shapes up to 40, up to ``most`` updates of ranks 1 to 6, gauges up to the condition."""
    return st.builds(
        Family,
        m=st.integers(6, 40),
        n=st.integers(6, 40),
        ranks=st.lists(st.integers(1, 6), min_size=1, max_size=most).map(tuple),
        dtype=st.just(dtype),
        condition=st.floats(1.0, condition),
        seed=st.integers(0, 2**31),
    )
