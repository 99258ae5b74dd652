"""The Python face of the optimizer steps: one call for all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import factor_reference as reference
from gauge_ext.ops.pair_batches import (
    column,
    effective,
    groups,
    has_kernel,
    stack,
    write,
    writes_to,
)


def scaled_gd_step(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    avg_A: Sequence[Tensor],
    avg_B: Sequence[Tensor],
    scaling: Sequence[float],
    anchors: Sequence[int],
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    damping: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """Take a step of ScaledGD on all pairs, in place.

    See :func:`gauge_ext.ops.factor_reference.scaled_gd` for the formula.

    Args:
        lora_A: Each ``(r, in)``, contiguous; all of one dtype and device.
        lora_B: Each ``(out, r)``, without the scaling.
        grad_A: Of the shapes and dtype of lora_A.
        grad_B: Of the shapes and dtype of lora_B.
        avg_A: The momentum of each pair, of the factors' shapes, in float32, or float64 for float64
            factors; empty without momentum. That of lora_B is by the effective factor.
        avg_B: As avg_A.
        scaling: s of each pair, not 0.
        anchors: Of each pair the factor that has full rank: 0 for lora_A, 1 for lora_B. The other
            may start at zero.
        lr: The step size.
        momentum: The factor of the old average.
        nesterov: Look ahead along the momentum.
        weight_decay: X shrinks by ``1 - lr * weight_decay``.
        damping: See :func:`~gauge_ext.ops.factor_reference.whitening`.
        grad_scale: Gradients count times this.

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, or a lora_A has a rank below r. Nothing
            has been written then. On a GPU, which no step waits for, the rank is found out there:
            such a step writes nothing, and the next one on that GPU raises.
    """
    if has_kernel(lora_A):
        torch.ops.gauge_ext.scaled_gd_step(
            *(lora_A, lora_B, grad_A, grad_B, avg_A, avg_B, scaling, anchors),
            *(lr, momentum, nesterov, weight_decay, damping, grad_scale),
        )
        return
    how = reference.ScaledGD(lr, momentum, nesterov, weight_decay, damping)
    writes: list[tuple[Tensor, Tensor]] = []
    for group in groups(lora_A, lora_B, anchors):
        s = column(scaling, group, lora_A[0])
        a, b, g_a, g_b = effective(lora_A, lora_B, grad_A, grad_B, group, s, grad_scale)
        q_a, q_b = (stack(avg, group) if avg else None for avg in (avg_A, avg_B))
        a, b, q_a, q_b = reference.scaled_gd(
            a, b, g_a, g_b, q_a, q_b, how, anchor_B=anchors[group[0]] == 1
        )
        writes += writes_to(lora_A, a, group) + writes_to(lora_B, b / s, group)
        if q_a is not None and q_b is not None:
            writes += writes_to(avg_A, q_a, group) + writes_to(avg_B, q_b, group)
    write(writes)


def gauge_adam_step(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    avg_A: Sequence[Tensor],
    avg_B: Sequence[Tensor],
    sq_A: Sequence[Tensor],
    sq_B: Sequence[Tensor],
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
    """Take a step of GaugeAdam on all pairs, in place.

    See :func:`gauge_ext.ops.factor_reference.gauge_adam` for the formula, and
    :func:`scaled_gd_step` for the arguments that are not named here.

    Args:
        lora_A: Each ``(r, in)``.
        lora_B: Each ``(out, r)``.
        grad_A: Of the shapes of lora_A.
        grad_B: Of the shapes of lora_B.
        avg_A: The averages of gradients.
        avg_B: Those by the effective factor.
        sq_A: The second moments, one number for a column of X: each ``(in,)``.
        sq_B: One number for a row of X: each ``(out,)``.
        scaling: s of each pair.
        anchors: 0 or 1 for each pair.
        steps: The number of this step for each pair, from 1.
        lr: The step size.
        beta1: The decay of the averages.
        beta2: The decay of the second moments.
        eps: Added to their roots.
        weight_decay: X shrinks by ``1 - lr * weight_decay``.
        damping: See :func:`~gauge_ext.ops.factor_reference.whitening`.
        grad_scale: Gradients count times this.

    Raises:
        RuntimeError: As :func:`scaled_gd_step`.
    """
    if has_kernel(lora_A):
        torch.ops.gauge_ext.gauge_adam_step(
            *(lora_A, lora_B, grad_A, grad_B, avg_A, avg_B, sq_A, sq_B, scaling),
            *(anchors, steps),
            *(lr, beta1, beta2, eps, weight_decay, damping, grad_scale),
        )
        return
    how = reference.Adam(lr, beta1, beta2, eps, weight_decay, damping)
    writes: list[tuple[Tensor, Tensor]] = []
    for group in groups(lora_A, lora_B, anchors):
        s = column(scaling, group, lora_A[0])
        step = column(steps, group, lora_A[0])[:, 0, 0]
        a, b, g_a, g_b = effective(lora_A, lora_B, grad_A, grad_B, group, s, grad_scale)
        state = [stack(part, group) for part in (avg_A, avg_B, sq_A, sq_B)]
        a, b, *new = reference.gauge_adam(
            *(a, b, g_a, g_b, state[0], state[1], state[2], state[3], step, how),
            anchor_B=anchors[group[0]] == 1,
        )
        writes += writes_to(lora_A, a, group) + writes_to(lora_B, b / s, group)
        for old, value in zip((avg_A, avg_B, sq_A, sq_B), new, strict=True):
            writes += writes_to(old, value, group)
    write(writes)


def factor_gradient_norm(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
    anchors: Sequence[int],
    *,
    damping: float = 0.0,
) -> Tensor:
    """Return the squared length of the gradients of all pairs together, the same in every gauge.

    See :func:`gauge_ext.ops.factor_reference.gradient_norm_squared` for the formula, and
    :func:`scaled_gd_step` for the arguments.

    Returns:
        ``()`` in float64, on the factors' device; on a GPU NaN where the CPU would raise for a rank
        below r.

    Raises:
        RuntimeError: As :func:`scaled_gd_step`.
    """
    if has_kernel(lora_A):
        return torch.as_tensor(
            torch.ops.gauge_ext.factor_gradient_norm(
                lora_A, lora_B, grad_A, grad_B, scaling, anchors, damping
            )
        )
    total = torch.zeros((), dtype=torch.float64, device=lora_A[0].device)
    for group in groups(lora_A, lora_B, anchors):
        s = column(scaling, group, lora_A[0])
        parts = effective(lora_A, lora_B, grad_A, grad_B, group, s, 1.0)
        anchor_B = anchors[group[0]] == 1
        norms = reference.gradient_norm_squared(*parts, damping, anchor_B=anchor_B)
        total = total + norms.sum()
    return total


def _fake_step(*args: object, **kwargs: object) -> None:
    return None


def _fake_norm(lora_A: Sequence[Tensor], *args: object) -> Tensor:
    return lora_A[0].new_empty((), dtype=torch.float64)


if _load.load().compiled:
    torch.library.register_fake("gauge_ext::scaled_gd_step", _fake_step)
    torch.library.register_fake("gauge_ext::gauge_adam_step", _fake_step)
    torch.library.register_fake("gauge_ext::factor_gradient_norm", _fake_norm)
