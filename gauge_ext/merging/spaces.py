"""Where the rules for single numbers work: the entries of the updates, or KnOTS's coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gauge_ext.geometry import LoRAPoint, linalg
from gauge_ext.geometry.low_rank import nearest_low_rank
from gauge_ext.merging.elementwise import check_size, combine_entries
from gauge_ext.merging.exact import (
    Compressed,
    balanced,
    choose_rank,
    noise,
    truncate,
)
from gauge_ext.merging.recipe import Recipe

# Up to this side a full decomposition of an update is as fast as a randomized one.
_EXACT_SIDE = 256


def combine_in_space(
    points: Sequence[LoRAPoint],
    weights: Sequence[float],
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    label: str = "",
) -> Compressed:
    """Combine by the recipe's rule in the recipe's space, and compress the result.

    Args:
        points: The updates.
        weights: One for each.
        recipe: One of the methods that keep a share of the entries.
        dtype: Of the result.
        label: Which layer it is; see :func:`~gauge_ext.merging.elementwise.combine_entries`.

    Raises:
        ConfigError: The updates are too large for their entries to be formed.
    """
    # Rounding may gather in a row, but hardly in one entry of it.
    root = math.sqrt(points[0].shape[1])
    floors = [noise(point, dtype) / root for point in points]
    if recipe.coordinates == "entries":
        check_size(points[0].shape)
        tasks = [partial(_product, point) for point in points]
        merged = combine_entries(tasks, weights, floors, recipe, label=label)
        # No more room than the factors side by side would take.
        limit = min(*points[0].shape, sum(point.rank for point in points))
        return truncate_matrix(merged, dtype, limit, recipe.rank, recipe.energy)
    basis, coordinates = knots(points)
    tasks = [partial(torch.clone, entry) for entry in coordinates]
    merged = combine_entries(tasks, weights, floors, recipe, label=label)
    return truncate(LoRAPoint(basis, merged), dtype, recipe.rank, recipe.energy)


def knots(points: Sequence[LoRAPoint]) -> tuple[Tensor, list[Tensor]]:
    r"""Write all updates in one orthonormal basis of their columns (KnOTS, arXiv:2410.19735).

    .. math:: [X_1 \; X_2 \dots] = U S [V_1^T \; V_2^T \dots], \qquad X_i = U\,(S V_i^T)

    in factor form: with :math:`[B_1 \; B_2 \dots] = Q [R_1 \; R_2 \dots]` and
    :math:`A_i^T = P_i L_i^T`, U and S are those of Q times the small matrix
    :math:`[R_1 L_1 \; R_2 L_2 \dots]`, so the work is O((m + n) (sum r_i)²). U is unique up to the
    signs of its columns where the values of S differ, so the coordinates are the same in every
    gauge up to signs of whole rows, which all updates share.

    Args:
        points: The updates.

    Returns:
        U ``(*batch, m, p)`` and, for each update, S V_i^T ``(*batch, p, n)``, in float64.
    """
    q, r = linalg.thin_qr(torch.cat([linalg.to_double(point.B) for point in points], -1))
    blocks = r.split([point.rank for point in points], dim=-1)
    small = [
        block @ linalg.thin_qr(point.A.mT)[1].mT
        for block, point in zip(blocks, points, strict=True)
    ]
    u, _, _ = torch.linalg.svd(torch.cat(small, -1), full_matrices=False)
    coordinates = [
        (u.mT @ block) @ linalg.to_double(point.A)
        for block, point in zip(blocks, points, strict=True)
    ]
    return q @ u, coordinates


def truncate_matrix(
    x: Tensor, dtype: torch.dtype, limit: int, rank: int | None, energy: float | None
) -> Compressed:
    """Compress a matrix ``(*batch, m, n)`` to the rank that is asked, at most ``limit``.

    A large one by :func:`~gauge_ext.geometry.low_rank.nearest_low_rank`, whose error is within a
    percent of the optimum.
    """
    limit = limit if rank is None else min(limit, rank)
    if x.ndim == 2 and min(x.shape) > max(_EXACT_SIDE, 2 * limit):
        found = nearest_low_rank(x, limit, energy=energy)
        if found is not None:
            error = x.new_tensor(found.unexplained).sqrt()
            return Compressed(found.point.to(dtype), error, found.singular_values)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    size = torch.linalg.matrix_norm(x)
    kept = choose_rank(s[..., :limit].square(), size.square(), limit, energy)
    left = torch.linalg.vector_norm(s[..., kept:], dim=-1)
    error = left / torch.where(size == 0, torch.ones_like(size), size)
    return Compressed(balanced(u, s, vh, kept, dtype), error, s)


def _product(point: LoRAPoint) -> Tensor:
    product: Tensor = linalg.to_double(point.B) @ linalg.to_double(point.A)
    return product
