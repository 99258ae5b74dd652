r"""What ``ParallelTransport(W_0, W_1)`` is good for: carrying updates along, and between, bases.

:func:`lift` turns a path of checkpoints into one smooth path of factors. :func:`move_base` carries
updates to a base that computes the same with its hidden units in another order or its heads
rotated, and :func:`rebase` keeps W_0 + X while the base below it changes. (The fourth reading, the
update nearest to W_1 - W_0, is :func:`~gauge_ext.geometry.low_rank.nearest_low_rank`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError
from gauge_ext.geometry.hidden_space import Fit, HiddenSpace, fit_space, turn
from gauge_ext.geometry.linalg import to_double
from gauge_ext.geometry.low_rank import LowRank, RowBlocks, nearest_low_rank
from gauge_ext.geometry.point import LoRAPoint
from gauge_ext.geometry.transport import MIN_OVERLAP, transport

# Below this cosine two hidden spaces are no reparametrisation of each other. The best match of
# unrelated weights has about 0.3, and of a base that drifted by 28% 0.96.
MIN_CORRELATION = 0.5


def lift(
    path: Sequence[LoRAPoint | Tensor],
    rank: int | None = None,
    *,
    base: Tensor | None = None,
    min_overlap: float = MIN_OVERLAP,
) -> list[LoRAPoint]:
    r"""Turn checkpoints of one layer into factors that change as little as the updates do.

    Each matrix W_k becomes the update of rank r nearest to W_k - W_0, whose factors any SVD would
    give in a frame of its own; then links carry the frame of the first along (see
    :func:`~gauge_ext.geometry.transport.transport`). Factors of the result may be averaged,
    interpolated and differentiated in time, which independently made ones may not.

    Args:
        path: Points, in whatever gauges; or whole weights ``(m, n)``.
        rank: r, needed for weights; points keep theirs.
        base: W_0 ``(m, n)``, subtracted from weights; None if they are updates already.
        min_overlap: The least overlap of neighbours that is accepted.

    Returns:
        As many points, with the updates of the path.

    Raises:
        ConfigError: There are weights and no rank.
        GeometryError: The path is empty, an update is zero or of a rank below the others', or
            neighbours are too far apart.
        NonFiniteError: A weight holds NaN or infinity.
    """
    points = []
    for index, step in enumerate(path):
        if isinstance(step, LoRAPoint):
            points.append(step)
            continue
        if rank is None:
            raise ConfigError("a path of weights needs a rank, got None.")
        difference = to_double(step) if base is None else to_double(step) - to_double(base)
        found = nearest_low_rank(difference, rank)
        if found is None or found.point.rank < rank:
            has = 0 if found is None else found.point.rank
            raise GeometryError(
                f"the update at step {index} of the path has rank {has}, and r is {rank}.",
                hint="Begin the path after training has, or ask for a lower rank.",
            )
        points.append(found.point.to(step.dtype))
    return transport(points, min_overlap=min_overlap)


def rebase(
    point: LoRAPoint,
    old: Tensor | RowBlocks,
    new: Tensor | RowBlocks,
    rank: int | None = None,
    *,
    energy: float | None = None,
    factor: Tensor | None = None,
) -> LowRank | None:
    r"""Keep :math:`W_0 + X` when the base becomes W_0': the update nearest to X + W_0 - W_0'.

    It keeps what the adapted layer computed, and so undoes what the new base learned. To keep that
    and X too, change nothing: under drift of the base the update carries over as it is.

    Args:
        point: X.
        old: W_0, ``(m, n)``.
        new: W_0', ``(m, n)``.
        rank: The rank of the new update; None for that of the point, unless an energy is given.
        energy: As in :func:`~gauge_ext.geometry.low_rank.nearest_low_rank`, like ``factor``.
        factor: A weight on the inputs.

    Returns:
        The new update in the point's dtype, and how much of X + W_0 - W_0' it is; None where
        nothing is left of that.

    Raises:
        GeometryError: The shapes differ, or the point is a batch.
        ConfigError: A rank or an energy is out of its range.
        NonFiniteError: A matrix holds NaN or infinity.
    """
    was = old if isinstance(old, RowBlocks) else RowBlocks.of(old)
    now = new if isinstance(new, RowBlocks) else RowBlocks.of(new)
    if point.batch_shape or not point.shape == was.shape == now.shape:
        raise GeometryError(
            f"an update {(*point.batch_shape, *point.shape)} and two bases of its shape are "
            f"needed, got {was.shape} and {now.shape}."
        )
    b, a = to_double(point.B), to_double(point.A)

    def read(start: int, stop: int) -> Tensor:
        kept = to_double(was.read(start, stop)) - to_double(now.read(start, stop))
        return kept + b[start:stop] @ a

    wanted = point.rank if rank is None and energy is None else rank
    found = nearest_low_rank(RowBlocks(point.shape, read), wanted, energy=energy, factor=factor)
    if found is None:
        return None
    return LowRank(
        found.point.to(point.dtype),
        found.singular_values,
        found.norm,
        found.unexplained,
        found.unexplained_plain,
    )


def move_base(
    points: Mapping[str, LoRAPoint],
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    structure: Sequence[HiddenSpace],
    *,
    min_correlation: float = MIN_CORRELATION,
) -> tuple[dict[str, LoRAPoint], list[Fit]]:
    r"""Carry updates to a base that is the old one in other hidden bases, up to some drift.

    For each space, with the sum over its layers (biases count as one more column),

    .. math:: S = \sum_{writers} W' W^T + \sum_{readers} W'^T W, \qquad
        T = \arg\max_T \operatorname{tr} T^T S

    by the assignment problem for permutations and by the polar factor of each head's block for
    rotations. Then B becomes T B on writers and A becomes A Tᵀ on readers. Layers in no space keep
    their updates, which is right for a base that only drifted. (Ainsworth et al.,
    arXiv:2209.04836, for the permutations.)

    Args:
        points: Path of the module -> its update.
        old: Weights of the base that the updates were made for, by their keys (``path.weight``
            and, where there is one, ``path.bias``).
        new: Those of the other base.
        structure: The hidden spaces. A layer may be in one of them only.
        min_correlation: The least cosine between W' and T W that is accepted.

    Returns:
        Path of the module -> its update on the new base; and the fit of each space.

    Raises:
        ConfigError: A layer is in two spaces.
        GeometryError: A layer is missing, shapes do not fit, a rotation is not determined by the
            weights, or the bases have nothing in common.
    """
    seen: dict[str, int] = {}
    for index, space in enumerate(structure):
        for layer in (*space.writers, *space.readers):
            if layer in seen:
                raise ConfigError(
                    f"{layer!r} lies between two hidden spaces, {seen[layer]} and {index} of the "
                    "structure, which its weight alone cannot tell apart.",
                    hint="Both may change sign together and leave it as it is. Name spaces that "
                    "share no layer.",
                )
            seen[layer] = index
    moved = dict(points)
    fits = []
    for space in structure:
        fit = fit_space(space, old, new)
        if fit.correlation < min_correlation:
            raise GeometryError(
                f"the weights around the hidden space of {space.writers or space.readers} have a "
                f"cosine of {fit.correlation:.2f} with those of the other base at best, and "
                f"{min_correlation:.2f} is needed.",
                hint="The new base is no reparametrisation of the old one, even with drift.",
            )
        fits.append(fit)
        for layer in space.writers:
            if layer in moved:
                point = moved[layer]
                turned = turn(fit, to_double(point.B)).to(point.dtype)
                moved[layer] = LoRAPoint(turned, point.A)
        for layer in space.readers:
            if layer in moved:
                point = moved[layer]
                turned = turn(fit, to_double(point.A).mT).mT.to(point.dtype)
                moved[layer] = LoRAPoint(point.B, turned)
    return moved, fits
