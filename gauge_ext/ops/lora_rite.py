"""LoRA-RITE's step of all layers at once, and its formula in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import pair_batches
from gauge_ext.ops.factor_reference import Adam, whitening
from gauge_ext.ops.pair_batches import column, effective, groups, stack, writes_to

SMALLEST_MOMENT = 1e-10
"""Second moments below this part of the largest of a layer's side count as this part: a gradient in
float32 has nothing but its rounding there, which else would be magnified to the size of a step."""

GRADIENT_MESSAGE = (
    "grad_A or grad_B of a pair holds NaN or infinity, of which there are no second moments. Leave "
    "such a step out, as torch.amp.GradScaler does."
)


T = TypeVar("T")


class RiteState(NamedTuple, Generic[T]):
    """What is kept between steps, of one pair, of a batch of pairs, or in lists of them.

    Attributes:
        frame_A: Orthonormal rows of the last step that span the rows of A, ``(r, in)``.
        frame_B: The same of Bᵀ, less the damping's share, ``(r, out)``.
        avg_A: The first moment of A's gradients in the frame of B, ``(r, in)``.
        avg_B: The first moment of B's gradients in the frame of A, ``(r, out)``.
        sq_A: The second moment of A's gradients, ``(r, r)`` in float64.
        sq_B: The second moment of B's, ``(r, r)`` in float64.
        rest: The damping's share of the frame that is not the anchor's, ``(r, r)`` in float64.
    """

    frame_A: T
    frame_B: T
    avg_A: T
    avg_B: T
    sq_A: T
    sq_B: T
    rest: T


def lora_rite_step(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    state: RiteState[list[Tensor]],
    scaling: Sequence[float],
    anchors: Sequence[int],
    steps: Sequence[int],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """Take a step of LoRA-RITE on all pairs, in place.

    See :func:`lora_rite` for the formula. Compiled for the CPU; on a GPU it is plain torch, batched
    over layers of one shape.

    Args:
        lora_A: Each ``(r, in)``, contiguous; all of one dtype and device.
        lora_B: Each ``(out, r)``, without the scaling.
        grad_A: Of the shapes and dtype of lora_A.
        grad_B: Of the shapes and dtype of lora_B.
        state: Lists of tensors, which are changed in place; zeros at first. Those of other shapes
            than ``(r, r)`` are in float32, or float64 for float64 factors.
        scaling: s of each pair, not 0.
        anchors: Of each pair the factor that has full rank: 0 for lora_A, 1 for lora_B.
        steps: The number of this step for each pair, from 1.
        lr: The step size.
        beta1: The decay of the first moments.
        beta2: The decay of the second moments.
        eps: Added to the roots of the second moments.
        weight_decay: X shrinks by ``1 - lr * weight_decay``.
        damping: See :func:`~gauge_ext.ops.factor_reference.whitening`.
        grad_scale: Gradients count times this.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, the anchor of a pair has a rank below r,
            or a gradient holds NaN. Nothing has been written then.
    """
    if pair_batches.has_kernel(lora_A, pair_batches.ON_CPU):
        torch.ops.gauge_ext.lora_rite_step(
            *(lora_A, lora_B, grad_A, grad_B, *state, scaling, anchors, steps),
            *(lr, beta1, beta2, eps, weight_decay, damping, grad_scale),
        )
        return
    how = Adam(lr, beta1, beta2, eps, weight_decay, damping)
    writes: list[tuple[Tensor, Tensor]] = []
    for group in groups(lora_A, lora_B, anchors):
        s = column(scaling, group, lora_A[0])
        a, b, g_a, g_b = effective(lora_A, lora_B, grad_A, grad_B, group, s, grad_scale)
        old = RiteState(*(stack(part, group) for part in state))
        step = column(steps, group, lora_A[0])
        a, b, new = lora_rite(a, b, g_a, g_b, old, step, how, anchor_B=anchors[group[0]] == 1)
        writes += writes_to(lora_A, a, group) + writes_to(lora_B, b / s, group)
        for part, value in zip(state, new, strict=True):
            writes += writes_to(part, value, group)
    pair_batches.write(writes)


def lora_rite(
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    state: RiteState[Tensor],
    step: Tensor,
    how: Adam,
    *,
    anchor_B: bool = False,
) -> tuple[Tensor, Tensor, RiteState[Tensor]]:
    r"""One step of LoRA-RITE (Yen et al., arXiv:2410.20625) with covariant damping.

    With :math:`E_A, E_M, K` of :func:`~gauge_ext.ops.factor_reference.whitening`, the rows of
    :math:`F_A = E_A^T A` are an orthonormal frame of the rows of X, and those of
    :math:`(F_B, K^T F_A)`, :math:`F_B = (B E_M)^T`, one of its columns, damped. From one step to
    the next the frames turn by

    .. math::
        P_A = F_A F_{A,\mathrm{old}}^T, \qquad
        P_B = F_B F_{B,\mathrm{old}}^T + K^T P_A K_\mathrm{old}

    and the moments with them. For B, with :math:`\hat g = (g_B E_A)^T` and m rows of B,

    .. math::
        v &\leftarrow \beta_2 P_A v P_A^T + (1 - \beta_2)\, \hat g \hat g^T / m, \\
        q &\leftarrow \beta_1 P_A q + (1 - \beta_1)\, (\hat v^{1/2} + \epsilon)^{-1} \hat g, \qquad
        B \leftarrow \rho B - \eta\, (E_A \hat q)^T

    and for A the same with :math:`\hat g = E_M^T g_A`, :math:`P_B` and :math:`A \leftarrow \rho A -
    \eta E_M (I - K^T K) \hat q`; :math:`\rho = \sqrt{1 - \eta\lambda}`, and hats are Adam's
    corrections of the bias. :math:`I - K^T K` has the eigenvalues
    :math:`\sigma^2 / (\sigma^2 + \delta)`: where B has no directions, as with fewer rows than r, v
    has made steps of the gradient's rounding, and they are not taken.

    Another gauge turns the frames by an orthogonal matrix and the moments with them, so X takes the
    same steps. Eigenvalues of v below :data:`SMALLEST_MOMENT` of the largest count as that part.

    Args:
        a: A, ``(*, r, n)`` in float64.
        b: The effective B, ``(*, m, r)`` in float64.
        grad_a: Its gradient.
        grad_b: The derivative by the effective B.
        state: Of the last step, in float64, with the batch's dimensions.
        step: The number of this step, from 1, ``(*, 1, 1)``.
        how: The numbers of the step.
        anchor_B: See :func:`~gauge_ext.ops.factor_reference.whitening`; :math:`P_A` has the
            damping's share then, and :math:`P_B` has not.

    Returns:
        A, B and the state after the step.

    Raises:
        RuntimeError: The anchor has a rank below r, or a gradient is not finite.
    """
    e = whitening(a, b, how.damping, anchor_B=anchor_B)
    frame_a, frame_b = e.of_B.mT @ a, (b @ e.of_A).mT
    turn_a, turn_b = frame_a @ state.frame_A.mT, frame_b @ state.frame_B.mT
    if anchor_B:
        turn_a = turn_a + e.rest.mT @ turn_b @ state.rest
    else:
        turn_b = turn_b + e.rest.mT @ turn_a @ state.rest
    avg_a, sq_a = _moments(e.of_A.mT @ grad_a, state.avg_A, state.sq_A, turn_b, step, how)
    avg_b, sq_b = _moments((grad_b @ e.of_B).mT, state.avg_B, state.sq_B, turn_a, step, how)
    held = torch.eye(len(e.rest[0]), dtype=a.dtype, device=a.device) - e.rest.mT @ e.rest
    step_a, step_b = (e.of_A, e.of_B @ held) if anchor_B else (e.of_A @ held, e.of_B)
    keep = (1.0 - how.lr * how.weight_decay) ** 0.5
    rate = how.lr / (1 - how.beta1**step)
    a_new = keep * a - rate * step_a @ avg_a
    b_new = keep * b - rate * (step_b @ avg_b).mT
    return a_new, b_new, RiteState(frame_a, frame_b, avg_a, avg_b, sq_a, sq_b, e.rest)


def _moments(
    grad: Tensor, avg: Tensor, sq: Tensor, turn: Tensor, step: Tensor, how: Adam
) -> tuple[Tensor, Tensor]:
    """Carry the moments into the new frame and add the gradient, ``(*, r, length)``."""
    fresh = grad @ grad.mT / grad.shape[-1]
    sq = how.beta2 * turn @ sq @ turn.mT + (1 - how.beta2) * fresh
    if not bool(sq.isfinite().all()):
        raise RuntimeError(GRADIENT_MESSAGE)
    values, vectors = torch.linalg.eigh(sq / (1 - how.beta2**step))
    values = torch.maximum(values, SMALLEST_MOMENT * values[..., -1:]).clamp_min(0)
    down = values.sqrt().unsqueeze(-2) + how.eps
    inverse = torch.where(down > 0, 1 / down, 0.0)
    avg = how.beta1 * turn @ avg + (1 - how.beta1) * (vectors * inverse) @ vectors.mT @ grad
    return avg, sq


def _fake_step(*args: object, **kwargs: object) -> None:
    return None


if _load.load().compiled:
    torch.library.register_fake("gauge_ext::lora_rite_step", _fake_step)
