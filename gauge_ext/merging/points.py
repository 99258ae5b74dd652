"""One layer's updates, combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging.exact import (
    Compressed,
    check_alike,
    common_dtype,
    floored,
    norm,
    relative_distance,
    truncate,
    weighted_sum,
)
from gauge_ext.merging.means import combine_factors
from gauge_ext.merging.recipe import MEANS, SPARSE, Recipe
from gauge_ext.merging.spaces import combine_in_space


@dataclass(frozen=True, eq=False)
class Combined:
    """The combination of several updates.

    Both distances are those before the result is rounded to its dtype.

    Attributes:
        point: It, in the balanced gauge and the inputs' common dtype.
        truncation: ``(*batch)`` what compressing the method's result to the rank cost: the
            distance over the norm, both Frobenius.
        deviation: ``(*batch)`` the distance of ``point`` from the weighted sum, over the norm of
            that; what the method intends and what the rank costs are both in it.
        norm: ``(*batch)`` the Frobenius norm of the weighted sum.
    """

    point: LoRAPoint
    truncation: Tensor
    deviation: Tensor
    norm: Tensor


@torch.no_grad()
def combine_points(
    points: Sequence[LoRAPoint],
    weights: Sequence[float],
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    label: str = "",
) -> Combined:
    """Combine updates of one layer.

    Args:
        points: The updates, ``(*batch, m, r_i)`` and ``(*batch, r_i, n)``.
        weights: One for each.
        recipe: How.
        dtype: Of the result; None for the inputs' common one.
        label: The layer's name, so that each drops entries of its own.

    Raises:
        ConfigError: A weight cannot be used, or the updates are too large for the method.
        NonFiniteError: A factor holds NaN or infinity.
        GeometryError: The updates do not fit each other, or are too unlike for the method.
    """
    weights = recipe.check_weights(weights, len(points))
    check_alike(points)
    stored = common_dtype(points)
    reference = weighted_sum(points, weights)
    found = _compressed(points, weights, reference, recipe, stored, label)
    if recipe.method == "exact":  # all of it is known from the decomposition already
        deviation = found.error
        size = floored(torch.linalg.vector_norm(found.singular_values, dim=-1), reference, stored)
    else:
        deviation = relative_distance(found.point, reference, stored)
        size = norm(reference, stored)
    return Combined(found.point.to(dtype or stored), found.error, deviation, size)


def _compressed(
    points: Sequence[LoRAPoint],
    weights: Sequence[float],
    reference: LoRAPoint,
    recipe: Recipe,
    stored: torch.dtype,
    label: str,
) -> Compressed:
    if recipe.method in SPARSE:
        return combine_in_space(points, weights, recipe, stored, label=label)
    if recipe.method in MEANS:
        reference = combine_factors(points, weights, recipe)
    return truncate(reference, stored, recipe.rank, recipe.energy)
