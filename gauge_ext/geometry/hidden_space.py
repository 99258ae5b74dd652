"""Spaces inside a model whose basis may change unseen, and the change between two bases of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError
from gauge_ext.geometry.assignment import best_assignment
from gauge_ext.geometry.linalg import to_double

# Singular values of what determines a rotation, relative to the largest, that count as zero.
_UNDETERMINED = 1e-10


@dataclass(frozen=True)
class HiddenSpace:
    r"""A space inside a model in which a change of basis leaves what it computes alone.

    The layers that write to it have W' = T W, those that read from it W' = W Tᵀ. T is a permutation
    (the hidden units of an MLP, whose activation acts on each alone) or a rotation of each head
    (values, which nothing acts on before the output projection).

    Attributes:
        writers: Paths of the layers whose outputs live in it.
        readers: Paths of the layers whose inputs live in it.
        kind: "permutation" or "rotation".
        heads: Blocks of T, all of one size, each with a rotation of its own. A layer several times
            as wide has as many copies of each block side by side (grouped-query attention).
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    kind: Literal["permutation", "rotation"] = "permutation"
    heads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("permutation", "rotation"):
            raise ConfigError(f"kind must be permutation or rotation, got {self.kind!r}.")
        if self.heads < 1 or (self.kind == "permutation" and self.heads != 1):
            raise ConfigError(
                "heads must be 1 for a permutation and at least 1 for a rotation, "
                f"got {self.heads}."
            )
        layers = (*self.writers, *self.readers)
        if len(layers) < 2 or len(set(layers)) < len(layers):
            raise ConfigError(
                "a hidden space lies between at least two different layers, got "
                f"{', '.join(map(repr, layers)) or 'none'}.",
                hint="One matrix between two unknown bases determines neither of them: both may "
                "change sign together.",
            )


@dataclass(frozen=True, eq=False)
class Fit:
    r"""The basis change of one hidden space, estimated from the weights.

    Attributes:
        space: The space.
        transform: T: blocks ``(heads, d, d)``, or for a permutation the source ``(h,)`` of each
            unit: unit i of the new base is unit ``transform[i]`` of the old one.
        before: ||W' - W|| / ||W'|| over the layers of the space: what it would be to do nothing.
        after: ||W' - T W|| / ||W'||: 0 for a pure reparametrisation.
        correlation: The cosine between W' and T W.
    """

    space: HiddenSpace
    transform: Tensor
    before: float
    after: float
    correlation: float


def fit_space(space: HiddenSpace, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Fit:
    """Estimate T of one hidden space; see :func:`move_base`.

    Raises:
        GeometryError: A layer is missing, shapes do not fit, or T is not determined.
    """
    pairs = []
    for layer in (*space.writers, *space.readers):
        writes = layer in space.writers
        pairs.append((_oriented(old, layer, writes), _oriented(new, layer, writes), layer))
    width = min(first.shape[0] for first, _, _ in pairs)
    score = pairs[0][0].new_zeros(space.heads, width // space.heads, width // space.heads)
    sizes, distance = [0.0, 0.0], 0.0
    for first, second, layer in pairs:
        if first.shape != second.shape or first.shape[0] % width or width % space.heads:
            raise GeometryError(
                f"{layer!r} has {first.shape[0]} units in the old base and {second.shape[0]} in "
                f"the new one, which do not fit a space of {width} in {space.heads} heads."
            )
        if space.kind == "permutation" and first.shape[0] != width:
            raise GeometryError(
                f"{layer!r} has {first.shape[0]} hidden units, and another layer of the space "
                f"{width}."
            )
        was, now = _heads(first, space.heads, width), _heads(second, space.heads, width)
        score += now @ was.mT
        sizes[0] += float(first.square().sum())
        sizes[1] += float(second.square().sum())
        distance += float((first - second).square().sum())
    if not all(math.isfinite(size) and size > 0.0 for size in sizes):
        raise GeometryError(f"the weights around {space.writers} are zero or not finite.")
    if space.kind == "permutation":
        transform = best_assignment(score[0])
        gain = float(score[0].gather(1, transform[:, None]).sum())
    else:
        u, s, vh = torch.linalg.svd(score)
        if bool((s[:, -1] <= _UNDETERMINED * s[:, 0]).any()):
            raise GeometryError(
                f"a rotation between the heads of {space.writers or space.readers} is not "
                "determined: their weights do not fill a head.",
                hint="Leave the space out of the structure.",
            )
        transform, gain = u @ vh, float(s.sum())
    after = math.sqrt(max(0.0, sizes[0] + sizes[1] - 2.0 * gain))
    norm = math.sqrt(sizes[1])
    correlation = gain / math.sqrt(sizes[0] * sizes[1])
    return Fit(space, transform, math.sqrt(distance) / norm, after / norm, correlation)


def _oriented(weights: Mapping[str, Tensor], layer: str, writes: bool) -> Tensor:
    """A layer's weight with the hidden space along its rows, and the bias of a writer beside it."""
    if f"{layer}.weight" not in weights:
        raise GeometryError(f"a base has no weight of {layer!r}, which the structure names.")
    weight = to_double(weights[f"{layer}.weight"].detach())
    if not writes:
        return weight.mT
    bias = weights.get(f"{layer}.bias")
    return weight if bias is None else torch.cat([weight, to_double(bias.detach())[:, None]], 1)


def _heads(rows: Tensor, heads: int, width: int) -> Tensor:
    """(copies of h units, k) -> (heads, d, copies * k): each head's copies side by side."""
    copies = rows.shape[0] // width
    parts = rows.reshape(heads, copies, width // heads, rows.shape[1])
    return parts.transpose(1, 2).reshape(heads, width // heads, -1)


def turn(fit: Fit, rows: Tensor) -> Tensor:
    """Return T times ``rows`` (width, k), or several copies of the width, side by side."""
    if fit.space.kind == "permutation":
        return rows[fit.transform.to(rows.device)]
    heads, size = fit.transform.shape[0], fit.transform.shape[1]
    parts = rows.reshape(heads, -1, size, rows.shape[1])
    turned: Tensor = fit.transform.to(rows.device).unsqueeze(1) @ parts
    return turned.reshape(rows.shape)
