"""The steps of the gauge-invariant optimizers in plain torch: what the compiled ops must compute.

Everything is batched over leading dimensions and computed in float64, from QR factors instead of
Gram matrices. B is the *effective* factor here, scaling times lora_B, and so is its gradient, the
derivative by it: the scaling is then no part of any formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-14
"""The least damping, in units of the squared norm of X: what float64 can tell from zero."""

RANK_TOLERANCE = 1e-7
"""A lora_A with a direction below this part of it counts as rank-deficient: its Gram matrix, with
the square, says no more in float64."""


class Adam(NamedTuple):
    """The numbers of a step of GaugeAdam or LoRARITE."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    damping: float


class ScaledGD(NamedTuple):
    """The numbers of a step of ScaledGD."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    damping: float


class Whitening(NamedTuple):
    r"""Inverse triangular factors of the metric on each side.

    Attributes:
        of_B: :math:`E_A = R_A^{-1}` with :math:`A A^T = R_A^T R_A`, ``(*, r, r)``.
        of_A: :math:`E_M = R_M^{-1}` with :math:`B^T B + \delta (A A^T)^{-1} = R_M^T R_M`.
        rest: :math:`K = \sqrt\delta\, E_A^T E_M`, the damping's share:
            :math:`(B E_M)^T B E_M + K^T K = I`.
    """

    of_B: Tensor
    of_A: Tensor
    rest: Tensor


def whitening(a: Tensor, b: Tensor, damping: float, *, anchor_B: bool = False) -> Whitening:
    r"""Factor the invariant metric with covariant damping at (B, A).

    .. math:: A A^T = R_A^T R_A, \qquad B^T B + \delta\,(A A^T)^{-1} = R_M^T R_M

    :math:`\delta` is at least :data:`RELATIVE_FLOOR` times :math:`\|X\|_F^2`, and 1 for X = 0,
    where the gradient by A is zero anyway. A is the anchor: it has full rank, and B may start at
    zero. With B as the anchor the two change places.

    Args:
        a: A, ``(*, r, n)`` in float64.
        b: The effective B, ``(*, m, r)`` in float64.
        damping: :math:`\delta \ge 0`, in units of :math:`\sigma(X)^2`.
        anchor_B: B is the anchor.

    Raises:
        RuntimeError: The rank of an anchor is below r, or it holds NaN.
    """
    if anchor_B:
        turned = whitening(b.mT, a.mT, damping)
        return Whitening(turned.of_A, turned.of_B, turned.rest)
    r_a = _upper(a.mT)
    r_b = torch.linalg.qr(b, mode="r").R
    diagonal = r_a.diagonal(dim1=-2, dim2=-1).abs()
    columns = torch.linalg.vector_norm(r_a, dim=-2)
    rank = r_a.shape[-1]
    if a.shape[-1] < rank or not bool((diagonal > RANK_TOLERANCE * columns).all()):
        raise RuntimeError(RANK_MESSAGE)
    eye = torch.eye(rank, dtype=a.dtype, device=a.device).expand_as(r_a)
    e_a = torch.linalg.solve_triangular(r_a, eye, upper=True)
    square = (r_b @ r_a.mT).square().sum((-2, -1))
    if not bool(square.isfinite().all()):
        raise RuntimeError(RANK_MESSAGE)
    delta = (RELATIVE_FLOOR * square).clamp_min(damping)
    delta = torch.where(delta == 0, 1.0, delta)[..., None, None]
    damped = delta.sqrt() * e_a.mT
    e_m = torch.linalg.solve_triangular(_upper(torch.cat([r_b, damped], -2)), eye, upper=True)
    return Whitening(e_a, e_m, damped @ e_m)


def _upper(x: Tensor) -> Tensor:
    """The Cholesky factor R of the Gram matrix of x, with a positive diagonal."""
    r = torch.linalg.qr(x, mode="r").R
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return torch.as_tensor(r * signs.unsqueeze(-1))


RANK_MESSAGE = (
    "lora_A (lora_B where training starts from lora_A = 0) has a rank below r, or a factor holds "
    "NaN or infinity, where the invariant step is undefined. Start with a factor of full rank, "
    "such as attach() draws."
)


def gradient_norm_squared(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    damping: float,
    *,
    anchor_B: bool = False,
) -> Tensor:
    r"""The squared length of the differential in the dual of the (damped) invariant metric.

    .. math:: \mathrm{tr}\, g_B (A A^T)^{-1} g_B^T
        + \mathrm{tr}\, g_A^T (B^T B + \delta (A A^T)^{-1})^{-1} g_A

    Args:
        a: A, ``(*, r, n)`` in float64.
        b: The effective B, ``(*, m, r)`` in float64.
        grad_a: :math:`g_A`.
        grad_b: :math:`g_B`, the derivative by the effective B.
        damping: :math:`\delta`.
        anchor_B: See :func:`whitening`.

    Returns:
        ``(*)``, the same in every gauge.
    """
    e = whitening(a, b, damping, anchor_B=anchor_B)
    by_b = (grad_b @ e.of_B).square().sum((-2, -1))
    by_a = (e.of_A.mT @ grad_a).square().sum((-2, -1))
    return torch.as_tensor(by_b + by_a)


def scaled_gd(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    avg_a: Tensor | None,
    avg_b: Tensor | None,
    how: ScaledGD,
    *,
    anchor_B: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    r"""One step of ScaledGD (arXiv:2005.08898) with covariant damping and momentum.

    .. math:: q \leftarrow \mu q + g, \qquad
        B \leftarrow \rho B - \eta\, q_B (A A^T)^{-1}, \qquad
        A \leftarrow \rho A - \eta\, (B^T B + \delta (A A^T)^{-1})^{-1} q_A

    with :math:`\rho = \sqrt{1 - \eta\lambda}` on either side, so that X shrinks by
    :math:`1 - \eta\lambda`. Averages of gradients are covectors and move like them, so the
    momentum is invariant too.

    Args:
        a: A, ``(*, r, n)`` in float64.
        b: The effective B, ``(*, m, r)`` in float64.
        grad_a: Its gradient.
        grad_b: The derivative by the effective B.
        avg_a: :math:`q_A`, or None without momentum.
        avg_b: :math:`q_B`, or None without momentum.
        how: The numbers of the step.
        anchor_B: See :func:`whitening`.

    Returns:
        A, B, :math:`q_A` and :math:`q_B` after the step.
    """
    e = whitening(a, b, how.damping, anchor_B=anchor_B)
    if avg_a is not None and avg_b is not None:
        avg_a, avg_b = how.momentum * avg_a + grad_a, how.momentum * avg_b + grad_b
        if how.nesterov:
            grad_a, grad_b = grad_a + how.momentum * avg_a, grad_b + how.momentum * avg_b
        else:
            grad_a, grad_b = avg_a, avg_b
    keep = (1.0 - how.lr * how.weight_decay) ** 0.5
    a_new = keep * a - how.lr * e.of_A @ (e.of_A.mT @ grad_a)
    b_new = keep * b - how.lr * (grad_b @ e.of_B) @ e.of_B.mT
    return a_new, b_new, avg_a, avg_b


def gauge_adam(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    avg_a: Tensor,
    avg_b: Tensor,
    sq_a: Tensor,
    sq_b: Tensor,
    step: Tensor,
    how: Adam,
    *,
    anchor_B: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""One step of GaugeAdam: Adam whose second moments are numbers of rows and columns of X.

    With :math:`E_A, E_M` of :func:`whitening`,

    .. math::
        q_B &\leftarrow \beta_1 q_B + (1 - \beta_1) g_B, \qquad
        v_{B,i} \leftarrow \beta_2 v_{B,i} + (1 - \beta_2) \tfrac1r \|(g_B E_A)_i\|^2, \\
        B &\leftarrow \rho B - \eta\, \hat D_B^{-1} (\hat q_B E_A) E_A^T, \qquad
        \hat D_B = \mathrm{diag}(\sqrt{\hat v_B} + \epsilon)

    and the same for the columns of A with :math:`E_M^T g_A`, where the hats are Adam's corrections
    of the bias. :math:`(g_B E_A)_i` is row i of :math:`\nabla_X f` seen from the row space of X:
    its length is the same in every gauge, and so is all that the step does to X.

    Args:
        a: A, ``(*, r, n)`` in float64.
        b: The effective B, ``(*, m, r)`` in float64.
        grad_a: Its gradient.
        grad_b: The derivative by the effective B.
        avg_a: :math:`q_A`.
        avg_b: :math:`q_B`.
        sq_a: :math:`v_A`, ``(*, n)``.
        sq_b: :math:`v_B`, ``(*, m)``.
        step: The number of this step, from 1, ``(*)``.
        how: The numbers of the step.
        anchor_B: See :func:`whitening`.

    Returns:
        A, B, :math:`q_A`, :math:`q_B`, :math:`v_A` and :math:`v_B` after the step.
    """
    e = whitening(a, b, how.damping, anchor_B=anchor_B)
    avg_a = how.beta1 * avg_a + (1 - how.beta1) * grad_a
    avg_b = how.beta1 * avg_b + (1 - how.beta1) * grad_b
    sq_a = how.beta2 * sq_a + (1 - how.beta2) * (e.of_A.mT @ grad_a).square().mean(-2)
    sq_b = how.beta2 * sq_b + (1 - how.beta2) * (grad_b @ e.of_B).square().mean(-1)
    first = (1 - how.beta1**step)[..., None, None]
    second = (1 - how.beta2**step)[..., None]
    down_a = first * ((sq_a / second).sqrt() + how.eps).unsqueeze(-2)
    down_b = first * ((sq_b / second).sqrt() + how.eps).unsqueeze(-1)
    keep = (1.0 - how.lr * how.weight_decay) ** 0.5
    a_new = keep * a - how.lr * e.of_A @ ((e.of_A.mT @ avg_a) / down_a)
    b_new = keep * b - how.lr * ((avg_b @ e.of_B) / down_b) @ e.of_B.mT
    return a_new, b_new, avg_a, avg_b, sq_a, sq_b
