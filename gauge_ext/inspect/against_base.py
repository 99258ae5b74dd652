"""An update beside the weight that it is added to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gauge_ext.checkpoint.pairing import match_names
from gauge_ext.checkpoint.weights import Weights, open_weights
from gauge_ext.errors import AdapterMismatchError
from gauge_ext.geometry import LoRAPoint, RowBlocks, nearest_low_rank
from gauge_ext.geometry.linalg import thin_qr

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BaseShare:
    r"""One layer's update X against its weight :math:`W_0`, both (out, in).

    Attributes:
        weight_norm: :math:`\|W_0\|_F`.
        share: :math:`\|X\|_F / \|W_0\|_F`.
        subspace: k, how many leading singular directions of :math:`W_0` are meant below.
        overlap: :math:`\|U_0^T X V_0\|_F^2 / \|X\|_F^2`, the share of the update's energy between
            the k leading left and right singular directions of :math:`W_0`; 0 for an update of
            zeros.
        chance: :math:`k^2 / (m n)`, what a random update has of it on average.
    """

    weight_norm: float
    share: float
    subspace: int
    overlap: float
    chance: float


def base_shares(
    points: Mapping[str, LoRAPoint],
    base: Weights | nn.Module | str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, BaseShare]:
    """Compare updates with the weights of their base, read some rows at a time.

    The leading directions come from a randomized SVD (arXiv:0909.4061), so those behind a narrow
    gap in the spectrum are near the true ones and not equal to them.

    Args:
        points: Path of the module -> ``(scaling * lora_B, lora_A)``.
        base: The base: a folder with safetensors weights, a module, or its weights.
        seed: Of the sketch.
        progress: Called as ``progress(what is being done, fraction done)``.

    Returns:
        Path of the module -> how its update compares.

    Raises:
        ConfigError: The folder is missing, damaged or quantized.
        AdapterMismatchError: A module of the adapter has no weight there, or one of another shape.
    """
    weights = open_weights(base)
    keys = {f"{name}.weight": name for name in points}
    partner = match_names(keys, weights.shapes, weights.name)
    if lost := [name for key, name in keys.items() if key not in partner]:
        raise AdapterMismatchError(
            f"{weights.name} has no weight for {lost[0]!r}"
            + (f" and {len(lost) - 1} more modules of the adapter." if len(lost) > 1 else "."),
            hint="Give the model that the adapter was trained on.",
        )
    found: dict[str, BaseShare] = {}
    for done, (key, other) in enumerate(partner.items()):
        name = keys[key]
        if progress is not None:
            progress(f"comparing {name} with the base", done / len(partner))
        found[name] = _share(name, points[name], weights, other, seed)
    return found


def _share(name: str, point: LoRAPoint, weights: Weights, key: str, seed: int) -> BaseShare:
    shape = weights.shapes[key]
    if shape != point.shape:
        raise AdapterMismatchError(
            f"the update of {name!r} has shape {point.shape}, and {key!r} of {weights.name} has "
            f"{shape}.",
            hint="Give the model that the adapter was trained on.",
        )
    k = min(point.rank, *shape)
    source = RowBlocks(point.shape, lambda start, stop: weights.rows(key, start, stop))
    top = nearest_low_rank(source, rank=k, seed=seed)
    weight_norm = 0.0 if top is None else top.norm
    exact = point.to(torch.float64)
    norm = float(exact.singular_values().norm())
    inside = 0.0
    if norm > 0.0 and top is not None:
        u, v = thin_qr(top.point.B)[0], thin_qr(top.point.A.mT)[0]
        inside = float(((u.mT @ exact.B) @ (exact.A @ v)).norm()) / norm
    return BaseShare(
        weight_norm=weight_norm,
        share=norm / weight_norm if weight_norm else math.inf if norm else 0.0,
        subspace=k,
        overlap=inside**2,
        chance=k * k / (shape[0] * shape[1]),
    )
