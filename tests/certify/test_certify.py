"""Certificates are never false, and say why where there is none: 1,000 random problems."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gauge_ext.certify import certify_basin, local_rate
from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.optim import FactorPair, ScaledGD

F64 = torch.float64


class Random:
    """Draws of one problem."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=F64)

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def low_rank(self, m: int, n: int, r: int, kappa: float) -> Tensor:
        sigma = torch.logspace(0, -math.log10(kappa), r, dtype=F64)
        u, v = torch.linalg.qr(self.normal(m, r)).Q, torch.linalg.qr(self.normal(n, r)).Q
        return (u * sigma) @ v.mT

    def factors(self, x: Tensor, r: int) -> LoRAPoint:
        """The best pair of rank r for x, in a random gauge."""
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        point = LoRAPoint(u[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * vh[:r])
        return point.act(self.normal(r, r) + 2 * torch.eye(r, dtype=F64))


def test_no_basin_is_certified_falsely_on_seven_hundred_problems() -> None:
    m, n, lr = 6, 5, 0.6
    certified = outside = 0
    for seed in range(700):
        draw = Random(seed)
        r = 1 + seed % 2
        target = draw.low_rank(m, n, r, 10 ** draw.uniform())
        root = torch.eye(n, dtype=F64) + 0.3 * draw.uniform() * draw.normal(n, n)
        c = root @ root.mT
        size = 10 ** (-3 + 3 * draw.uniform())
        point = draw.factors(target + size * draw.normal(m, n) / math.sqrt(m * n), r)
        if seed % 5 == 0:  # a minimizer of full rank, to which no theorem applies
            target = target + 0.1 * size * draw.normal(m, n)
        found = certify_basin(point, (point.product() - target) @ c, c)
        assert found.certified == (found.reason is None)
        if not found.certified:
            outside += 1
            continue
        certified += 1
        assert seed % 5, "the minimizer is of full rank"
        # Run it, in the coordinates that it speaks of, and measure against the theorem.
        values, vectors = torch.linalg.eigh(c)
        half = (vectors * values.sqrt()) @ vectors.mT
        goal = target @ half
        b = point.B.clone().requires_grad_()
        a = (point.A @ half).requires_grad_()
        optimizer = ScaledGD([FactorPair(a, b)], lr=lr, damping=0.0)
        # The error is at most (1 + .05) sqrt(2) times the distance, and that is within both bounds.
        sigma_r = float(torch.linalg.svdvals(goal)[r - 1])
        bound = 1.5 * min(found.distance_bound, 0.1 * sigma_r)
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (b @ a - goal).square().sum()).backward()
            optimizer.step()
            bound *= found.rate(lr)
            assert float((b.detach() @ a.detach() - goal).norm()) <= bound
    assert certified > 100
    assert outside > 100


def rank_one_distance(b: Tensor, a: Tensor, target: Tensor) -> float:
    """The distance from a target of rank 1, exactly: it is least at a root of a quartic."""
    u, s, vh = torch.linalg.svd(target)
    sigma, left, right = float(s[0]), s[0].sqrt() * u[:, 0], s[0].sqrt() * vh[0]
    b, a = b.flatten(), a.flatten()
    quartic = [float(b @ b), -float(b @ left), 0.0, float(a @ right), -float(a @ a)]
    gauges = [float(q.real) for q in np.roots(quartic) if abs(q.imag) < 1e-12 * abs(q)]
    squares = [(q * b - left).square().sum() + (a / q - right).square().sum() for q in gauges]
    return math.sqrt(sigma * float(min(squares)))


def test_each_step_shrinks_the_distance_by_the_rate() -> None:
    certified = needed = 0
    for seed in range(300):
        draw, lr = Random(30_000 + seed), (0.1, 0.4, 0.6, 2 / 3)[seed % 4]
        target = draw.low_rank(6, 5, 1, 1.0)
        u, s, vh = torch.linalg.svd(target)
        b, a = s[0].sqrt() * u[:, :1], s[0].sqrt() * vh[:1]
        point = LoRAPoint(b + 0.02 * draw.normal(6, 1), a + 0.02 * draw.normal(1, 5))
        found = certify_basin(point, point.product() - target, 1.0)
        if not found.certified:
            continue
        certified += 1
        before = rank_one_distance(point.B, point.A, target)
        assert before <= found.distance_bound
        b, a = point.B.clone().requires_grad_(), point.A.clone().requires_grad_()
        (0.5 * (b @ a - target).square().sum()).backward()
        ScaledGD([FactorPair(a, b)], lr=lr, damping=0.0).step()
        after = rank_one_distance(b.detach(), a.detach(), target)
        assert after <= found.rate(lr) * before
        needed += after > (1 - lr) * before
    assert certified > 100
    assert needed > 20  # a rate of 1 - lr would be false


def test_a_step_on_the_plain_factors_is_longer_by_the_curvature() -> None:
    draw, lr = Random(5), 0.6
    target = draw.low_rank(6, 5, 2, 2.0)
    point = draw.factors(target + 1e-3 * draw.normal(6, 5), 2)
    found = certify_basin(point, 3.0 * (point.product() - target), 3.0)
    errors = {}
    for size in (lr / 3.0, lr):
        b, a = point.B.clone().requires_grad_(), point.A.clone().requires_grad_()
        optimizer = ScaledGD([FactorPair(a, b)], lr=size, damping=0.0)
        for _ in range(6):
            optimizer.zero_grad()
            (1.5 * (b @ a - target).square().sum()).backward()
            optimizer.step()
        errors[size] = math.sqrt(3.0) * float((b.detach() @ a.detach() - target).norm())
    assert errors[lr / 3.0] <= 1.5 * found.rate(lr) ** 6 * found.distance_bound
    assert errors[lr] > found.error


def test_no_local_rate_is_certified_falsely_on_three_hundred_problems() -> None:
    m, n = 5, 4
    counts = {True: 0, False: 0}
    for seed in range(300):
        draw = Random(10_000 + seed)
        r = 1 + seed % 2
        x = draw.low_rank(m, n, r, 3.0)
        point = draw.factors(x, r)
        kind = seed % 3
        c = draw.normal(n, 7)
        quadratic = c @ c.mT / 7 + 0.1 * torch.eye(n, dtype=F64)
        # A minimum; a saddle, where directions off X fall; or a point that is not stationary.
        u, _, vh = torch.linalg.svd(x)
        saddle = (5.0 if kind == 1 else 0.0) * u[:, r:n] @ vh[r:]
        target = x + (0.1 * draw.normal(m, n) if kind == 2 else saddle)
        weight = torch.eye(n, dtype=F64) if kind == 1 else quadratic
        a, b = point.A.clone().requires_grad_(), point.B.clone().requires_grad_()

        def loss(a: Tensor = a, b: Tensor = b, y: Tensor = target, c: Tensor = weight) -> Tensor:
            difference = b @ a - y
            return 0.5 * ((difference @ c) * difference).sum()

        found = local_rate(loss, [FactorPair(a, b)], max_steps=60)
        counts[found.certified] += 1
        assert found.certified == (kind == 0), found.reason
        if not found.certified:
            assert found.reason
            continue
        # The pencil by brute force: in the metric of the updates, on tangent matrices at X.
        basis, lengths = [], []
        for i in range(m):
            for j in range(n):
                if i < r or j < r:
                    basis.append(torch.outer(u[:, i], vh[j]))
                    lengths.append(0.5 if i < r and j < r else 1.0)
        hessian = torch.tensor([[float(((p @ weight) * q).sum()) for q in basis] for p in basis])
        scale = torch.tensor(lengths).rsqrt()
        want = torch.linalg.eigvalsh((scale[:, None] * hessian * scale).double())
        assert found.smallest == pytest.approx(float(want[0]), rel=1e-5)
        assert found.largest == pytest.approx(float(want[-1]), rel=1e-5)
    assert min(counts.values()) >= 90


def test_at_the_optimum_of_factorization_the_pencil_is_one_and_two() -> None:
    draw = Random(0)
    for kappa in (1.0, 1e4):
        x = draw.low_rank(9, 7, 3, kappa)
        point = draw.factors(x, 3)
        a, b = point.A.clone().requires_grad_(), (point.B / 0.5).requires_grad_()
        found = local_rate(
            lambda a=a, b=b, x=x: 0.5 * (0.5 * b @ a - x).square().sum(), [FactorPair(a, b, 0.5)]
        )
        assert found.certified, found.reason
        assert found.smallest == pytest.approx(1.0, abs=1e-5)
        assert found.largest == pytest.approx(2.0, abs=1e-5)
        assert found.best_lr == pytest.approx(2 / 3, abs=1e-5)
        assert found.rate(0.5) == pytest.approx(0.5, abs=1e-5)


def test_the_local_rate_is_what_scaled_gd_does() -> None:
    draw = Random(1)
    x = draw.low_rank(8, 6, 2, 5.0)
    c = draw.normal(6, 9)
    c = c @ c.mT / 9 + 0.2 * torch.eye(6, dtype=F64)
    point = draw.factors(x, 2)
    a, b = point.A.clone().requires_grad_(), point.B.clone().requires_grad_()

    def loss() -> Tensor:
        difference = b @ a - x
        return 0.5 * ((difference @ c) * difference).sum()

    found = local_rate(loss, [FactorPair(a, b)])
    assert found.certified, found.reason
    with torch.no_grad():
        b.add_(1e-3 * draw.normal(8, 2))
        a.add_(1e-3 * draw.normal(2, 6))
    optimizer = ScaledGD([FactorPair(a, b)], lr=found.best_lr, damping=0.0)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        errors.append(float((b.detach() @ a.detach() - x).norm()))
    measured = (errors[50] / errors[30]) ** (1 / 20)
    assert measured == pytest.approx(found.rate(found.best_lr), rel=0.02)


def test_where_nothing_is_proven_the_reason_is_said() -> None:
    draw = Random(2)
    net = nn.Linear(5, 6).double()
    a = draw.normal(2, 5).requires_grad_()
    b = torch.zeros(6, 2, dtype=F64, requires_grad=True)

    def loss() -> Tensor:
        return (net(torch.ones(5, dtype=F64)) + b @ (a @ torch.ones(5, dtype=F64))).square().sum()

    found = local_rate(loss, [FactorPair(a, b)])
    assert not found.certified
    assert "rank of the update is below r" in str(found.reason)
    with pytest.raises(GeometryError, match="there is no rate: the rank of the update"):
        found.rate(0.1)
    x = draw.low_rank(30, 25, 3, 2.0)
    weight = torch.linspace(1, 2, 25, dtype=F64)
    point = draw.factors(x, 3)
    for dtype, steps, reason in (
        (F64, 5, "after 5 of up to 156 steps the extremes are estimates"),
        (torch.float32, 500, "in lower precision than float64"),
    ):
        p = [t.to(dtype).requires_grad_() for t in (point.A, point.B)]
        found = local_rate(
            lambda p=p: (((p[1] @ p[0] - x.to(p[0])) ** 2) * weight.to(p[0])).sum(),
            [FactorPair(*p)],
            max_steps=steps,
        )
        assert not found.certified
        assert re.search(reason, str(found.reason))
    with pytest.raises(GeometryError, match="needs pairs and at least one step"):
        local_rate(loss, [])


def test_basin_certificates_refuse_with_a_reason() -> None:
    draw = Random(3)
    x = draw.low_rank(6, 5, 2, 2.0)
    point = draw.factors(x, 2)
    small = 1e-3 * draw.normal(6, 5)
    near = draw.factors(x + small, 2)
    gradient = near.product() - x
    assert certify_basin(near, gradient, 1.0).certified
    assert certify_basin(near, 3.0 * gradient, 3.0).certified
    cases = [
        (near, gradient, 0.0, "curvature is not positive definite"),
        (near, gradient * math.nan, 1.0, "NaN or infinity"),
        (near, gradient + small, 1.0, "singular values beyond the r-th"),
        (LoRAPoint(0 * point.B, point.A), -x, 1.0, "the rank of X is below r"),
        (point, point.product() - 2 * x, 1.0, "only known to be below"),
    ]
    for where, g, curvature, reason in cases:
        found = certify_basin(where, g, curvature)
        assert not found.certified
        assert reason in str(found.reason)
        with pytest.raises(GeometryError, match="there is no certificate"):
            found.rate(0.5)
    with pytest.raises(GeometryError, match=r"lr must lie in \(0, 2/3\], got 1"):
        certify_basin(near, gradient, 1.0).rate(1.0)
    with pytest.raises(GeometryError, match="needs one point and a gradient of shape"):
        certify_basin(near, gradient.mT, 1.0)
    with pytest.raises(GeometryError, match=r"curvature must have shape \(5, 5\)"):
        certify_basin(near, gradient, torch.eye(4))
    with pytest.raises(GeometryError, match="curvature must be symmetric"):
        certify_basin(near, gradient, draw.normal(5, 5))
