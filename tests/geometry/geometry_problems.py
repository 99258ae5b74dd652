"""Random points, tangent vectors and gauges for the theorems, and norms to measure them by.

A point is built from its singular value decomposition and then put into a gauge of a drawn
condition, so that what a theorem has to bear is known: sigma_1 / sigma_r <= 10 and cond G <= 600.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.geometry import LoRAPoint, LoRATangent

F64, F32 = torch.float64, torch.float32

theorem = settings(max_examples=10)
"""Of every theorem as many examples, each with a dtype, a rank, a gauge and shapes of its own."""


@dataclass(frozen=True)
class Problem:
    """Shapes, a dtype, the condition of the gauges, and the seed of all else."""

    m: int
    n: int
    r: int
    dtype: torch.dtype
    condition: float
    seed: int
    batch: tuple[int, ...] = ()

    def draw(self) -> Draw:
        return Draw(self)


class Draw:
    """One problem's random objects, in the order in which they are asked for."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.generator = torch.Generator().manual_seed(problem.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*self.p.batch, *shape, generator=self.generator, dtype=F64)

    def orthonormal(self, rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(self.normal(rows, columns)).Q

    def gauge(self) -> Tensor:
        """G in float64, with singular values from 1/sqrt(c) to sqrt(c)."""
        r = self.p.r
        half = 0.5 * math.log10(self.p.condition)
        scales = torch.logspace(-half, half, r, dtype=F64) if r > 1 else torch.ones(1, dtype=F64)
        return self.orthonormal(r, r) @ torch.diag(scales) @ self.orthonormal(r, r)

    def balanced(self) -> LoRAPoint:
        """A point with singular values between 1 and 10, in its svd gauge, in float64."""
        p = self.p
        sigma = torch.logspace(1, 0, p.r, dtype=F64).sqrt()
        return LoRAPoint(
            self.orthonormal(p.m, p.r) * sigma, sigma[:, None] * self.orthonormal(p.n, p.r).mT
        )

    def point(self) -> LoRAPoint:
        """A point in a random gauge, in the problem's dtype."""
        return self.balanced().act(self.gauge()).to(self.p.dtype)

    def near(self, point: LoRAPoint, size: float = 0.1) -> LoRAPoint:
        """A neighbour, perturbed in its balanced gauge and then put into a random one."""
        u, s, vh = torch.linalg.svd(point.to(F64).product(), full_matrices=False)
        r = self.p.r
        root = s[..., :r].sqrt()
        b = (u[..., :r] * root.unsqueeze(-2)) + size * self.normal(self.p.m, r)
        a = root.unsqueeze(-1) * vh[..., :r, :] + size * self.normal(r, self.p.n)
        return LoRAPoint(b, a).act(self.gauge()).to(self.p.dtype)

    def tangent(self, gauge: Tensor | None = None) -> LoRATangent:
        """A tangent vector of unit size in a balanced gauge, moved by ``gauge`` if there is one."""
        eta = LoRATangent(self.normal(self.p.m, self.p.r), self.normal(self.p.r, self.p.n))
        return (eta if gauge is None else eta.act(gauge)).to(self.p.dtype)


def problems(
    *,
    dtypes: tuple[torch.dtype, ...] = (F64, F32),
    max_rank: int = 6,
    min_rank: int = 1,
    ratio: int = 1,
    batches: tuple[tuple[int, ...], ...] = ((), (3,)),
) -> st.SearchStrategy[Problem]:
    """Problems with both sides from ``ratio`` times the rank to 24 more."""

    @st.composite
    def build(draw: st.DrawFn) -> Problem:
        r = draw(st.integers(min_rank, max_rank))
        return Problem(
            m=draw(st.integers(ratio * r, ratio * r + 24)),
            n=draw(st.integers(ratio * r, ratio * r + 24)),
            r=r,
            dtype=draw(st.sampled_from(dtypes)),
            condition=draw(st.sampled_from([1.0, 20.0, 600.0])),
            seed=draw(st.integers(0, 2**31)),
            batch=draw(st.sampled_from(batches)),
        )

    return build()


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """The largest over a batch of ||got - want|| / ||scale||, with want as the usual scale."""
    got, want = got.to(F64), want.to(F64)
    size = torch.linalg.matrix_norm(want if scale is None else scale.to(F64))
    return float((torch.linalg.matrix_norm(got - want) / size).max())


def dense_differential(point: LoRAPoint, eta: LoRATangent) -> Tensor:
    """eta_B A + B eta_A in float64, by definition."""
    b, a = point.B.to(F64), point.A.to(F64)
    return eta.B.to(F64) @ a + b @ eta.A.to(F64)


def dense_metric(point: LoRAPoint, eta: LoRATangent, xi: LoRATangent) -> Tensor:
    """<eta_B A, xi_B A> + <B eta_A, B xi_A> in float64, by definition."""
    b, a = point.B.to(F64), point.A.to(F64)
    left = (eta.B.to(F64) @ a) * (xi.B.to(F64) @ a)
    right = (b @ eta.A.to(F64)) * (b @ xi.A.to(F64))
    return (left + right).sum((-2, -1))


def numpy_factors(point: LoRAPoint) -> tuple[np.ndarray, np.ndarray]:
    return point.B.double().numpy(), point.A.double().numpy()
