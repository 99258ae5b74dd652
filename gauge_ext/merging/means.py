"""Means of factors: of adapters that are alike, each turned to face the others first.

Factors have no meaning of their own, so they are averaged after a change of gauge that brings them
as close as can be. The mean of adapters that share no directions is nonetheless a poor one, since
the cross terms of ``(B_1 + B_2)(A_1 + A_2)`` do not cancel; such adapters are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint, LoRATangent, linalg
from gauge_ext.geometry.connection import horizontal
from gauge_ext.geometry.transport import link
from gauge_ext.merging.exact import truncate, weighted_sum
from gauge_ext.merging.recipe import Recipe

# They converge linearly, the faster the more alike the adapters are: 10 to 50 steps above the
# smallest overlap that is accepted.
_MAX_STEPS = 200
_SETTLED = 1e-12


def combine_factors(
    points: Sequence[LoRAPoint], weights: Sequence[float], recipe: Recipe
) -> LoRAPoint:
    """Return the mean that the recipe names, times the sum of the weights.

    So for adapters that are equal up to a gauge it is their weighted sum.

    Args:
        points: Updates of one shape and one rank.
        weights: Positive, one for each.
        recipe: One of the methods "procrustes", "bures", "karcher".

    Returns:
        A pair of the same rank, float64.

    Raises:
        GeometryError: The ranks differ, two adapters overlap too little, or no mean was found.
    """
    _check_ranks(points)
    frames = [balanced_frame(point) for point in points]
    _check_alignment(frames, recipe)
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    if recipe.method == "karcher":
        mean = karcher_mean(points, shares)
        return LoRAPoint(mean.B * total, mean.A)
    frame = bures_mean(frames, shares) if recipe.method == "bures" else aligned(frames, shares)
    rows = points[0].shape[0]
    frame = frame * math.sqrt(total)
    return LoRAPoint(frame[..., :rows, :], frame[..., rows:, :].mT)


def alignment(first: LoRAPoint, second: LoRAPoint) -> Tensor:
    r"""Say how alike two updates are, ``(*batch)`` from 0 to 1, in every gauge.

    .. math:: \frac{\|Y_1^T Y_2\|_*}{\|Y_1\|_F \|Y_2\|_F}, \qquad
        Y = \begin{bmatrix} U S^{1/2} \\ V S^{1/2} \end{bmatrix}

    the cosine between Y_1 and the nearest Y_2 Q: 1 where one update is a positive multiple of the
    other, 0 where they share neither columns nor rows, and 1/2 where they share one of the two.
    Its square is the fidelity of the Bures-Wasserstein distance. An update of zeros is like none.
    """
    return _cosine(balanced_frame(first), balanced_frame(second))


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    nuclear = torch.linalg.svdvals(first.mT @ second).sum(-1)
    sizes = torch.linalg.matrix_norm(first) * torch.linalg.matrix_norm(second)
    cosine: Tensor = nuclear / torch.where(sizes == 0, torch.ones_like(sizes), sizes)
    return cosine


def balanced_frame(point: LoRAPoint) -> Tensor:
    """Return Y = [B; A^T] in the balanced gauge, ``(*batch, m + n, r)``."""
    u, s, vh = linalg.product_svd(point.B, point.A)
    root = s.sqrt().unsqueeze(-2)
    return torch.cat([u * root, vh.mT * root], -2)


def aligned(frames: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    r"""Average balanced frames after turning each to the first (Procrustes alignment).

    .. math:: \sum_i w_i Y_i Q_i, \qquad Q_i = \arg\min_{Q^TQ=I} \|Y_1 - Y_i Q\|_F
        = P H^T \text{ for } Y_i^T Y_1 = P \Sigma H^T

    Args:
        frames: Y_i, ``(*batch, m + n, r)``.
        shares: w_i, whose sum is 1.
    """
    return _turned(frames, shares, frames[0])


def bures_mean(frames: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    r"""Return the Bures-Wasserstein mean of the frames' updates.

    The Y that minimises :math:`\sum_i w_i \min_Q \|Y - Y_i Q\|_F^2`: the mean of the matrices
    :math:`Y_i Y_i^T = \begin{bmatrix} (XX^T)^{1/2} & X \\ X^T & (X^TX)^{1/2} \end{bmatrix}` among
    those of rank r. Found by aligning all frames to their mean again and again, which never makes
    the sum larger (generalised Procrustes analysis, Gower 1975; for positive definite matrices
    Alvarez-Esteban et al., arXiv:1511.05355). It begins at the weighted sum cut to rank r, so that
    the order of the adapters does not matter.

    Args:
        frames: Y_i, ``(*batch, m + n, r)``.
        shares: w_i, whose sum is 1.

    Raises:
        GeometryError: It did not converge.
    """
    q, r = linalg.thin_qr(torch.cat(list(frames), -1))
    small = list(r.split(frames[0].shape[-1], dim=-1))  # Y_i = q small_i; the mean is q times one
    mean = aligned(small, shares)
    for _ in range(_MAX_STEPS):
        last, mean = mean, _turned(small, shares, mean)
        if _settled(mean - last, mean):
            return q @ mean
    raise _unsettled("Bures-Wasserstein")


def _turned(frames: Sequence[Tensor], shares: Sequence[float], target: Tensor) -> Tensor:
    mean = torch.zeros_like(target)
    for frame, share in zip(frames, shares, strict=True):
        u, _, vh = torch.linalg.svd(frame.mT @ target, full_matrices=False)
        mean = mean + share * (frame @ (u @ vh))
    return mean


def karcher_mean(points: Sequence[LoRAPoint], shares: Sequence[float]) -> LoRAPoint:
    r"""Return the pair at which the differences of all pairs, linked to it, balance.

    .. math:: \sum_i w_i\, \eta_i = 0, \qquad
        \eta_i = \operatorname{hor}\bigl(U_i \cdot (B_i, A_i) - (B, A)\bigr), \qquad
        U_i = \text{link from } (B, A) \text{ to } (B_i, A_i)

    The Karcher mean :math:`\sum w_i \log_p p_i = 0` of the invariant metric, with the horizontal
    difference of linked frames in place of its logarithm, for which there is no closed form; the
    two agree to first order in the distance, as the inverse of any retraction does (R-barycentres:
    Kaneko, Fiori and Tanaka, IEEE Trans. Signal Processing 61, 2013). It turns frames by all of
    GL(r), where :func:`bures_mean` uses rotations of balanced ones.

    Args:
        points: Updates of one shape and one rank.
        shares: w_i, whose sum is 1.

    Returns:
        The mean, float64.

    Raises:
        GeometryError: A link is undefined (a rank-deficient update, or spaces that overlap too
            little), or the iteration did not converge.
    """
    for point in points:
        point.require_full_rank("A Karcher mean")
    double = torch.float64
    # Balanced, so that the gauges of the inputs add no rounding to the links.
    frames = [truncate(point.to(double), double, point.rank, None).point for point in points]
    mean = truncate(weighted_sum(frames, shares), double, points[0].rank, None).point
    for _ in range(_MAX_STEPS):
        step = LoRATangent(torch.zeros_like(mean.B), torch.zeros_like(mean.A))
        for frame, share in zip(frames, shares, strict=True):
            moved = frame.act(link(mean, frame))
            step = step + LoRATangent(moved.B - mean.B, moved.A - mean.A) * share
        step = horizontal(mean, step)
        mean = LoRAPoint(mean.B + step.B, mean.A + step.A)
        if _settled(step.B, mean.B) and _settled(step.A, mean.A):
            return mean
    raise _unsettled("Karcher")


def _settled(step: Tensor, x: Tensor) -> bool:
    sizes = torch.linalg.matrix_norm(x)
    return bool((torch.linalg.matrix_norm(step) <= _SETTLED * sizes).all())


def _unsettled(name: str) -> GeometryError:
    return GeometryError(
        f"the {name} mean did not settle within {_MAX_STEPS} steps: the adapters are too unlike.",
        hint='Take the method "exact".',
    )


def _check_ranks(points: Sequence[LoRAPoint]) -> None:
    ranks = [point.rank for point in points]
    if len(set(ranks)) > 1:
        raise GeometryError(
            f"a mean of factors needs adapters of one rank, got ranks {ranks}.",
            hint='Take the method "exact", or compress them to one rank first.',
        )


def _check_alignment(frames: Sequence[Tensor], recipe: Recipe) -> None:
    for i, first in enumerate(frames):
        for j, second in enumerate(frames[:i]):
            cosine = float(_cosine(first, second).min())
            # Not "<": a cosine that is NaN is refused as well.
            if not cosine >= recipe.min_alignment:
                raise GeometryError(
                    f"adapters {j + 1} and {i + 1} are aligned to {cosine:.3f}, less than "
                    f"{recipe.min_alignment:g}: they are not versions of one another, and the "
                    f"average of their factors ({recipe.method}) would be neither.",
                    hint='Take the method "exact", which holds for any adapters.',
                )
