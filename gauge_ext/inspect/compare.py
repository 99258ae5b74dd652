"""Two adapters beside each other, layer by layer and as wholes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gauge_ext.errors import AdapterMismatchError
from gauge_ext.geometry import LoRAPoint, frobenius_distance, principal_angles

#: Updates closer than this, relative to the larger, count as one: the rounding of bfloat16 factors.
DUPLICATE_DISTANCE = 0.02


@dataclass(frozen=True)
class LayerComparison:
    r"""The updates X and Y of one layer.

    Attributes:
        name: The module's path.
        cosine: :math:`\langle X, Y \rangle / (\|X\| \|Y\|)`; NaN where one is zero.
        distance: :math:`\|X - Y\|_F / \max(\|X\|_F, \|Y\|_F)`; 0 where both are zero.
        column_angles: Principal angles between the column spaces (outputs), ascending, in degrees.
        row_angles: Those between the row spaces (inputs).
    """

    name: str
    cosine: float
    distance: float
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Two adapters.

    Attributes:
        name: The other adapter, as it was given.
        layers: The layers that both have, in the order of the first adapter.
        only_here: Layers that only the first has.
        only_there: Layers that only the other has.
        cosine: Of all layers together, an absent one counting as zero; NaN where one is zero.
        distance: Of all layers together, over the larger norm.
    """

    name: str
    layers: tuple[LayerComparison, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    cosine: float
    distance: float

    @property
    def duplicate(self) -> bool:
        """Whether the two are one update, however each is factored and stored."""
        return self.distance <= DUPLICATE_DISTANCE


def compare(
    first: Mapping[str, LoRAPoint], second: Mapping[str, LoRAPoint], name: str
) -> Comparison:
    """Compare two adapters; nothing depends on the gauge of either, and no update is formed.

    Args:
        first: Path of the module -> ``(scaling * lora_B, lora_A)``.
        second: The same of the other adapter.
        name: What to call the other.

    Raises:
        AdapterMismatchError: They have no module in common, or one with different shapes.
    """
    common = [path for path in first if path in second]
    if not common:
        raise AdapterMismatchError(
            f"{name} has no layer in common with the adapter.",
            hint="Only adapters for one base model can be compared.",
        )
    squares = {"first": 0.0, "second": 0.0, "distance": 0.0, "dot": 0.0}
    layers = []
    for path in common:
        x, y = first[path].to(torch.float64), second[path].to(torch.float64)
        if x.shape != y.shape:
            raise AdapterMismatchError(
                f"the updates of {path!r} have shapes {x.shape} and, in {name}, {y.shape}.",
                hint="Only adapters for one base model can be compared.",
            )
        layers.append(_layer(path, x, y, squares))
    only_here = tuple(path for path in first if path not in second)
    only_there = tuple(path for path in second if path not in first)
    for points, lone, key in ((first, only_here, "first"), (second, only_there, "second")):
        energy = math.fsum(float(points[path].singular_values().square().sum()) for path in lone)
        squares[key] += energy
        squares["distance"] += energy
    larger = max(squares["first"], squares["second"])
    return Comparison(
        name=name,
        layers=tuple(layers),
        only_here=only_here,
        only_there=only_there,
        cosine=_cosine(squares["dot"], squares["first"], squares["second"]),
        distance=math.sqrt(squares["distance"] / larger) if larger else 0.0,
    )


def _layer(path: str, x: LoRAPoint, y: LoRAPoint, squares: dict[str, float]) -> LayerComparison:
    mine, theirs = (float(point.singular_values().square().sum()) for point in (x, y))
    distance = float(frobenius_distance(x, y))
    # <X, Y> = tr(A_x^T B_x^T B_y A_y) through the r x r products.
    dot = float(((x.B.mT @ y.B) * (x.A @ y.A.mT)).sum())
    for key, value in zip(squares, (mine, theirs, distance**2, dot), strict=True):
        squares[key] += value
    columns, rows = principal_angles(x, y)
    larger = math.sqrt(max(mine, theirs))
    return LayerComparison(
        name=path,
        cosine=_cosine(dot, mine, theirs),
        distance=distance / larger if larger else 0.0,
        column_angles=tuple(torch.rad2deg(columns).tolist()),
        row_angles=tuple(torch.rad2deg(rows).tolist()),
    )


def _cosine(dot: float, mine: float, theirs: float) -> float:
    return max(-1.0, min(1.0, dot / math.sqrt(mine * theirs))) if mine and theirs else math.nan
