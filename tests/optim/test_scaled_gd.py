"""Property 43: inside the basin ScaledGD contracts at the rate that its paper proves."""

from __future__ import annotations

import pytest
import torch
from optim_problems import F64
from scipy.optimize import minimize
from torch import Tensor

from gauge_ext.optim import FactorPair, ScaledGD


def distance(b: Tensor, a: Tensor, b_star: Tensor, a_star: Tensor) -> float:
    r"""The paper's distance, by minimizing over Q from the minimizer of the first term."""
    root = torch.linalg.svdvals(b_star @ a_star)[: a.shape[0]].sqrt()

    def square(flat: Tensor) -> Tensor:
        q = flat.view(len(root), len(root))
        left = (b @ q - b_star) * root
        right = root[:, None] * (torch.linalg.solve(q, a) - a_star)
        return left.square().sum() + right.square().sum()

    def with_gradient(x: object) -> tuple[float, object]:
        flat = torch.as_tensor(x, dtype=F64).requires_grad_()
        value = square(flat)
        (gradient,) = torch.autograd.grad(value, flat)
        return float(value.detach()), gradient.numpy()

    start = torch.linalg.lstsq(b, b_star).solution.flatten().numpy()
    found = minimize(with_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-14})
    return float(found.fun) ** 0.5


@pytest.mark.parametrize("kappa", [1.0, 100.0])
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_the_distance_contracts_by_one_minus_seven_tenths_of_the_step(
    kappa: float, condition: float
) -> None:
    m, n, r, lr = 12, 10, 3, 0.5
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    u, v = torch.linalg.qr(normal(m, r)).Q, torch.linalg.qr(normal(n, r)).Q
    sigma = torch.logspace(0, -torch.tensor(kappa).log10().item(), r, dtype=F64)
    b_star, a_star = u * sigma.sqrt(), sigma.sqrt()[:, None] * v.mT
    target = b_star @ a_star
    noise = normal(m, n)
    near = target + 0.04 * sigma[-1] * noise / torch.linalg.matrix_norm(noise, 2)
    left, s, right = torch.linalg.svd(near)
    b, a = left[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * right[:r]
    scales = torch.logspace(0, torch.tensor(condition).log10().item(), r, dtype=F64)
    b, a = (b / scales).requires_grad_(), (scales[:, None] * a).requires_grad_()
    optimizer = ScaledGD([FactorPair(a, b)], lr=lr, damping=0.0)
    last = distance(b.detach(), a.detach(), b_star, a_star)
    assert 0 < last <= 0.1 * float(sigma[-1])  # in the basin of the theorem
    for _ in range(8):
        optimizer.zero_grad()
        (0.5 * (b @ a - target).square().sum()).backward()
        optimizer.step()
        now = distance(b.detach(), a.detach(), b_star, a_star)
        assert now <= (1 - 0.7 * lr) * last * (1 + 1e-6)
        last = now
