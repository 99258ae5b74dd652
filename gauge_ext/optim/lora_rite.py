"""LoRA-RITE: matrix-valued second moments in orthonormal frames of the factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gauge_ext.ops import factor_reference
from gauge_ext.optim.base import FactorOptimizer, Layers, Params


class LoRARITE(FactorOptimizer):
    r"""LoRA-RITE (Yen et al., arXiv:2410.20625): transformation-invariant Adam with r x r moments.

    With :math:`A^T = V R_A`, orthonormal V, and W the left singular vectors of X,

    .. math::
        \hat g &= g_B R_A^{-1}, \qquad P = V_t^T V_{t-1}, \\
        v &\leftarrow \beta_2 P v P^T + (1 - \beta_2)\, \hat g^T \hat g / m, \\
        q &\leftarrow \beta_1 q P^T + (1 - \beta_1)\, \hat g\,(\hat v^{1/2} + \epsilon)^{-1}, \qquad
        B \leftarrow \rho B - \eta\, \hat q R_A^{-T}

    and for A the same in the frame W, with the singular values of X damped by
    :math:`\sigma^2 / (\sigma^2 + \delta)` where the paper divides by them, so that B = 0 may be the
    start. The paper's escaped mass, what of v the projection P loses, is not added, and there is no
    clipping but ``max_grad_norm``. It runs in plain torch in float64, batched over the layers of
    one shape: dearer than :class:`GaugeAdam`, whose second moments are numbers.

    Args:
        params: See :class:`FactorOptimizer`; :func:`~gauge_ext.optim.factor_pairs` finds the pairs.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`, in units of the gradient by X.
        weight_decay: :math:`\lambda`: each step X shrinks by :math:`1 - \eta\lambda`.
        damping: :math:`\delta`, in units of :math:`\sigma(X)^2`.
        max_grad_norm: Bounds :meth:`FactorOptimizer.grad_norm` of each group; None: no bound.

    Raises:
        ConfigError: An option has a value that cannot be used, or a pair is none.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    def step_pairs(self, layers: Layers, group: dict[str, Any], grad_scale: float) -> None:
        """Change the factors of ``layers`` in place."""
        batches: dict[tuple[int, ...], list[int]] = {}
        for i, (a, b) in enumerate(zip(layers.A, layers.B, strict=True)):
            self._start(layers.parameters[i], a, b)
            step = self.state[layers.parameters[i][0]]["step"]
            batches.setdefault((*a.shape, *b.shape, step, layers.anchors[i]), []).append(i)
        writes: list[tuple[Tensor, Tensor]] = []
        for batch in batches.values():
            writes += self._step_batch(layers, batch, group, grad_scale)
        torch._foreach_copy_([old for old, _ in writes], [new for _, new in writes])
        for pair in layers.parameters:
            for factor in pair:
                self.state[factor]["step"] += 1

    def _start(self, pair: tuple[Tensor, Tensor], a: Tensor, b: Tensor) -> None:
        rank, columns, rows = a.shape[0], a.shape[1], b.shape[0]
        for factor, length, other in ((pair[0], columns, rows), (pair[1], rows, columns)):
            if not self.state[factor]:
                self.state[factor].update(
                    step=0,
                    frame_avg=self.moments(factor, (length, rank)),
                    frame_sq=self.moments(factor, (rank, rank)),
                    frame=self.moments(factor, (other, rank)),
                )

    def _step_batch(
        self, layers: Layers, batch: list[int], group: dict[str, Any], grad_scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        def stack(tensors: list[Tensor]) -> Tensor:
            return torch.stack([tensors[i] for i in batch]).double()

        state_a = [self.state[layers.parameters[i][0]] for i in batch]
        state_b = [self.state[layers.parameters[i][1]] for i in batch]
        a, b = stack(layers.A), stack(layers.B)
        s = a.new_tensor([layers.scaling[i] for i in batch])[:, None, None]
        grad_a, grad_b = stack(layers.grad_A) * grad_scale, stack(layers.grad_B) * (grad_scale / s)
        sides = [(a, grad_a, state_a), ((b * s).mT, grad_b.mT, state_b)]
        if layers.anchors[batch[0]] == 1:
            sides.reverse()  # the same for the transpose of X
        (anchor, grad_anchor, _), (other, grad_other, _) = sides
        view = _Frames.of(anchor, other.mT, group["damping"])
        by_other = _moments(sides[1][2], grad_other.mT @ view.to_row, view.row, group)
        by_anchor = _moments(sides[0][2], grad_anchor.mT @ view.to_column, view.column, group)
        lr = group["lr"]
        keep = (1.0 - lr * group["weight_decay"]) ** 0.5
        new = [
            keep * anchor - lr * (by_anchor.direction @ view.to_column.mT).mT,
            keep * other - lr * (by_other.direction @ view.to_row.mT).mT,
        ]
        kept = [(by_anchor, view.column), (by_other, view.row)]
        if layers.anchors[batch[0]] == 1:
            new.reverse()
            kept.reverse()
        new_a, new_b = new[0], new[1].mT / s
        (moved_a, frame_a), (moved_b, frame_b) = kept
        writes = []
        for k, i in enumerate(batch):
            writes += [(layers.A[i], new_a[k]), (layers.B[i], new_b[k])]
            for state, moved, frame in (
                (state_a[k], moved_a, frame_a),
                (state_b[k], moved_b, frame_b),
            ):
                writes += [
                    (state["frame_avg"], moved.average[k]),
                    (state["frame_sq"], moved.square[k]),
                    (state["frame"], frame[k]),
                ]
        return writes


class _Frames(NamedTuple):
    """Orthonormal frames of X's rows and columns, and what takes gradients into them."""

    row: Tensor
    """V, (*, n, r)."""
    column: Tensor
    """W, (*, m, r)."""
    to_row: Tensor
    """R_A^-1: g_B times it is G V."""
    to_column: Tensor
    """g_A^T times it is G^T W with the singular values damped."""

    @classmethod
    def of(cls, a: Tensor, b: Tensor, damping: float) -> _Frames:
        inverse = factor_reference.whitening(a, b, damping).of_B  # and the rank is r
        v, r_a = torch.linalg.qr(a.mT)
        u, r_b = torch.linalg.qr(b)
        left, sigma, right = torch.linalg.svd(r_b @ r_a.mT)
        gauge = r_a.mT @ right.mT  # T with A = T Z^T for the right singular vectors Z
        least = torch.finfo(sigma.dtype).eps * sigma[..., :1].square()
        floor = least.clamp_min(damping)
        denominator = sigma.square() + floor
        filtered = sigma / torch.where(denominator == 0, 1.0, denominator)
        return cls(v, u @ left, inverse, gauge * filtered.unsqueeze(-2))


class _Moved(NamedTuple):
    average: Tensor
    square: Tensor
    direction: Tensor


def _moments(
    states: list[dict[str, Any]], grad: Tensor, frame: Tensor, group: dict[str, Any]
) -> _Moved:
    """Carry the moments into the new frame and add the gradient, ``(*, length, r)``."""
    beta1, beta2 = group["betas"]
    step = states[0]["step"] + 1
    old, average, square = (
        torch.stack([state[name] for state in states]).double()
        for name in ("frame", "frame_avg", "frame_sq")
    )
    p = frame.mT @ old
    square = beta2 * p @ square @ p.mT + (1 - beta2) * grad.mT @ grad / grad.shape[-2]
    values, vectors = torch.linalg.eigh(square / (1 - beta2**step))
    root = (vectors / (values.clamp_min(0).sqrt() + group["eps"]).unsqueeze(-2)) @ vectors.mT
    average = beta1 * average @ p.mT + (1 - beta1) * grad @ root
    return _Moved(average, square, average / (1 - beta1**step))
