"""The arithmetic of adapters: sums, means, sparse merges, compression.

Everything here depends on the updates s·B·A alone, so that an adapter and a regauged copy of it
are the same to every method. :mod:`exact` adds and compresses without loss, :mod:`means` averages
factors of adapters that are alike, :mod:`elementwise` holds TIES, DARE and pruning and
:mod:`spaces` the numbers that they work on, :mod:`recipe` the options and what they refuse,
:mod:`points` combines one layer and :mod:`adapters` a whole adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast, overload

from gauge_ext.checkpoint import AdapterCheckpoint
from gauge_ext.errors import ConfigError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging.adapters import CombinedAdapter, CombinedLayer, combine_adapters
from gauge_ext.merging.exact import Compressed, compress, weighted_sum
from gauge_ext.merging.means import alignment
from gauge_ext.merging.points import Combined, combine_points
from gauge_ext.merging.recipe import METHODS, MIN_ALIGNMENT, SPACES, Method, Recipe, Space

__all__ = [
    "METHODS",
    "MIN_ALIGNMENT",
    "SPACES",
    "Combined",
    "CombinedAdapter",
    "CombinedLayer",
    "Compressed",
    "Method",
    "Recipe",
    "Space",
    "alignment",
    "combine",
    "compress",
    "weighted_sum",
]


@overload
def combine(
    adapters: Sequence[LoRAPoint],
    weights: Sequence[float],
    *,
    method: Method = ...,
    rank: int | None = ...,
    energy: float | None = ...,
    density: float | None = ...,
    seed: int = ...,
    space: Space | None = ...,
    min_alignment: float = ...,
) -> Combined: ...
@overload
def combine(
    adapters: Sequence[AdapterCheckpoint],
    weights: Sequence[float],
    *,
    method: Method = ...,
    rank: int | None = ...,
    energy: float | None = ...,
    density: float | None = ...,
    seed: int = ...,
    space: Space | None = ...,
    min_alignment: float = ...,
    progress: Callable[[str, float], None] | None = ...,
) -> CombinedAdapter: ...
def combine(
    adapters: Sequence[LoRAPoint] | Sequence[AdapterCheckpoint],
    weights: Sequence[float],
    *,
    method: Method = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    space: Space | None = None,
    min_alignment: float = MIN_ALIGNMENT,
    progress: Callable[[str, float], None] | None = None,
) -> Combined | CombinedAdapter:
    r"""Combine adapters of one base model into one.

    Ranks, alphas and rsLoRA may differ, since effective factors (s·lora_B, lora_A) are combined. A
    module that an adapter lacks is a zero update there.

    ==================  ============================================================================
    method              result
    ==================  ============================================================================
    "exact"             The weighted sum :math:`\sum w_i s_i B_i A_i`, at its best approximation of
                        the rank; without ``rank`` and ``energy`` the sum itself.
    "procrustes"        Mean of balanced factors, each turned to the first adapter's.
    "bures"             The same, turned to the mean: the Bures-Wasserstein mean.
    "karcher"           Mean of factors, each brought to the mean's gauge by its link.
    "ties"              Entries of small size dropped, a sign elected for each, the mean of those
                        that agree with it (arXiv:2306.01708).
    "dare_linear"       Entries dropped at random and the others scaled up (arXiv:2311.03099), then
                        the weighted sum.
    "dare_ties"         Entries dropped at random, then elected as in TIES.
    "magnitude_prune"   Entries of small size dropped, then the weighted sum.
    "knots"             TIES with ``space = "knots"`` (arXiv:2410.19735).
    ==================  ============================================================================

    The means are for versions of one adapter: of one rank, with positive weights, and refused where
    two have an :func:`alignment` below ``min_alignment``. They return the sum of the weights times
    the mean, as "exact" does for equal adapters. Methods that elect signs need positive weights;
    their result is the weighted sum of what agrees over how many agree, as in PEFT, so weights of 1
    make it the mean.

    Methods that keep a share of entries work on numbers of the *updates*: ``space = "entries"``
    takes all entries of s·B·A, forms them, and is for layers up to 8192 x 8192; "knots" takes
    coordinates in a common basis of the adapters' columns and stays in factor form at any size.
    Without ``rank`` their results are cut to the sum of the adapters' ranks.

    Args:
        adapters: Points of one shape (batches too), or adapters that
            :func:`gauge_ext.checkpoint.read_adapter` returned.
        weights: One for each.
        method: See above.
        rank: The largest rank of the result, for each module.
        energy: The share of the squared norm to keep, in (0, 1], for each module; the smallest rank
            that does, and no more than ``rank``.
        density: The share of entries to keep, in (0, 1].
        seed: Of the entries that DARE drops.
        space: "entries" (the default but for "knots") or "knots".
        min_alignment: The least alignment of two adapters of which a mean is taken, in [0, 1].
        progress: Called as ``progress(what is being done, fraction done)``; for adapters alone.

    Returns:
        :class:`Combined` for points and :class:`CombinedAdapter` for adapters, with the distance
        from the exact weighted sum beside the result.

    Raises:
        ConfigError: An option or a weight cannot be used.
        AdapterMismatchError: A module has different shapes in two adapters, or is missing in one
            where a mean is asked for.
        NonFiniteError: A factor holds NaN or infinity.
        GeometryError: Points do not fit each other, or adapters are too unlike for the method.
    """
    recipe = Recipe(method, rank, energy, density, seed, space, min_alignment)
    kinds = {type(adapter) for adapter in adapters}
    if kinds <= {LoRAPoint}:
        return combine_points(cast("Sequence[LoRAPoint]", adapters), weights, recipe)
    if kinds <= {AdapterCheckpoint}:
        found = cast("Sequence[AdapterCheckpoint]", adapters)
        return combine_adapters(found, weights, recipe, progress=progress)
    raise ConfigError(
        "adapters must be all points or all adapters that were read, got "
        f"{', '.join(sorted(kind.__name__ for kind in kinds))}.",
        hint="Read a folder with gauge_ext.checkpoint.read_adapter.",
    )
