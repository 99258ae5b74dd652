"""A candidate that lives in the study alone: Muon's step in coordinates that no gauge changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gauge_ext.optim import FactorPair

_SMALLEST = 1e-10  # of the squared singular values, beside the largest: float32 knows no smaller


class RiemannianMuon(torch.optim.Optimizer):
    r"""Muon (Jordan et al., 2024) on the whitened gradients of a factor pair.

    With B the effective factor (:math:`X = BA`), :math:`q \leftarrow \mu q + g` and
    :math:`p = g + \mu q` (Nesterov),

    .. math:: A A^T = L L^T, \quad B^T B + \delta (A A^T)^{-1} = M M^T, \quad
        B \leftarrow B - \eta c\, \mathrm{polar}(p_B L^{-T})\, L^{-1}, \quad
        A \leftarrow A - \eta c\, M^{-T}\, \mathrm{polar}(M^{-1} p_A)

    where :math:`c = \sqrt{\max(1, m/n)}` for X of m rows and n columns. :math:`p_B L^{-T}` is the
    gradient by X on the orthonormal rows :math:`L^{-1}A`; another gauge turns these coordinates by
    an orthogonal matrix, with which the polar factor commutes, so the step of X is the same in
    every gauge. The step of X by B has all its r singular values equal to :math:`\eta c`.

    Args:
        pairs: From :func:`gauge_ext.optim.factor_pairs`; matrices.
        lr: :math:`\eta`, in units of the singular values of X.
        momentum: :math:`\mu`.
        damping: :math:`\delta`, in units of :math:`\sigma(X)^2`, as of ScaledGD.
    """

    def __init__(
        self,
        pairs: Iterable[FactorPair],
        lr: float,
        *,
        momentum: float = 0.95,
        damping: float = 1e-3,
    ) -> None:
        self._pairs = list(pairs)
        factors = [factor for pair in self._pairs for factor in pair[:2]]
        super().__init__(factors, {"lr": lr, "momentum": momentum, "damping": damping})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Change the factors in place."""
        if closure is not None:
            raise ValueError("RiemannianMuon takes no closure; compute the loss before step().")
        (group,) = self.param_groups
        for pair in self._pairs:
            s = pair.scaling
            a, b = pair.lora_A.double(), pair.lora_B.double() * s
            ahead_a = self._ahead(pair.lora_A, group["momentum"])
            ahead_b = self._ahead(pair.lora_B, group["momentum"]) / s
            rate = group["lr"] * max(1.0, len(b) / a.shape[1]) ** 0.5
            gram = a @ a.mT
            left = torch.linalg.cholesky(gram)
            metric = b.mT @ b + group["damping"] * torch.cholesky_inverse(left)
            other = torch.linalg.cholesky(metric)
            by_b = polar(torch.linalg.solve_triangular(left, ahead_b.mT, upper=False))
            by_a = polar(torch.linalg.solve_triangular(other, ahead_a, upper=False))
            step_b = torch.linalg.solve_triangular(left.mT, by_b, upper=True).mT
            step_a = torch.linalg.solve_triangular(other.mT, by_a, upper=True)
            pair.lora_A.copy_(a - rate * step_a)
            pair.lora_B.copy_((b - rate * step_b) / s)

    def _ahead(self, factor: Tensor, momentum: float) -> Tensor:
        """The gradient with the momentum it has after it; 64 bits."""
        gradient = factor.grad.double()
        state = self.state[factor]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.mul_(momentum).add_(gradient)
        return gradient + momentum * buffer


def polar(rows: Tensor) -> Tensor:
    """Return ``(K K^T)^(-1/2) K`` of K (r, n), 64 bits: its singular values become 1.

    Those below 1e-5 of the largest become smaller than 1, as rounding made them; 0 stays 0.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    values = values.clamp(min=0)
    damped = values + _SMALLEST * values[-1]
    scale = torch.where(damped > 0, damped, 1.0).rsqrt()
    return (vectors * scale) @ (vectors.mT @ rows)
