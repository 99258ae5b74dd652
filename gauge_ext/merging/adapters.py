"""Whole adapters, combined module by module."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import AdapterCheckpoint, LoRAPair, assemble, write_adapter
from gauge_ext.errors import AdapterMismatchError, GaugeError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging.points import combine_points
from gauge_ext.merging.recipe import MEANS, Recipe

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CombinedLayer:
    """What became of one module.

    Attributes:
        name: The module's path.
        shape: (out, in).
        ranks: Those of the adapters that have the module.
        rank: That of the result.
        norm: The Frobenius norm of the weighted sum.
        truncation: What the compression to ``rank`` cost, over the norm of the method's result.
        deviation: The distance of the result from the weighted sum, over ``norm``; 0 where both
            are zero.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    rank: int
    norm: float
    truncation: float
    deviation: float


@dataclass(frozen=True)
class CombinedAdapter:
    """The combination of several adapters.

    Attributes:
        checkpoint: It, in memory; its scaling is 1.
        layers: One entry a module, in the order of their paths.
        recipe: How it was made.
        weights: One for each adapter.
    """

    checkpoint: AdapterCheckpoint
    layers: tuple[CombinedLayer, ...]
    recipe: Recipe
    weights: tuple[float, ...]

    @property
    def norm(self) -> float:
        """The Frobenius norm of the weighted sums of all modules together."""
        return math.hypot(*(layer.norm for layer in self.layers))

    @property
    def deviation(self) -> float:
        """The distance of the result from the weighted sum over :attr:`norm`, all together."""
        distance = math.hypot(
            *(layer.norm * layer.deviation for layer in self.layers if layer.norm)
        )
        return distance / self.norm if self.norm else 0.0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a folder in PEFT's format; see :func:`gauge_ext.checkpoint.write_adapter`.

        Raises:
            WriteError: The system refused a write; nothing is left or changed at ``path``.
        """
        return write_adapter(self.checkpoint.config, self.checkpoint.tensors, path)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite deviation becomes None."""
        return {
            "sha256": self.checkpoint.sha256,
            "method": self.recipe.method,
            "weights": list(self.weights),
            "totals": {
                "layers": len(self.layers),
                "parameters": parameters(self.checkpoint),
                "norm": self.norm,
                "deviation": _finite(self.deviation),
            },
            "layers": [
                {
                    "name": layer.name,
                    "out_features": layer.shape[0],
                    "in_features": layer.shape[1],
                    "ranks": list(layer.ranks),
                    "rank": layer.rank,
                    "norm": layer.norm,
                    "truncation": layer.truncation,
                    "deviation": _finite(layer.deviation),
                }
                for layer in self.layers
            ],
        }


def combine_adapters(
    adapters: Sequence[AdapterCheckpoint],
    weights: Sequence[float],
    recipe: Recipe,
    *,
    progress: Progress | None = None,
) -> CombinedAdapter:
    """Combine adapters; see :func:`gauge_ext.merging.combine`.

    Args:
        adapters: Those that :func:`gauge_ext.checkpoint.read_adapter` returns.
        weights: One for each.
        recipe: How.
        progress: Called as ``progress(what is being done, fraction done)``.

    Raises:
        ConfigError: A weight cannot be used, or a layer is too large for the method.
        AdapterMismatchError: A module has different shapes in two adapters, or is missing in one
            where the method needs all.
        GeometryError: Two adapters are too unlike for the method; the module is named.
    """
    weights = recipe.check_weights(weights, len(adapters))
    _warn_of_bases(adapters)
    for adapter in adapters:
        adapter.require_plain("combined")
    names = sorted({name for adapter in adapters for name in adapter.tensors})
    for name in names:
        _check_module(name, adapters, recipe)
    tensors: dict[str, LoRAPair] = {}
    layers: list[CombinedLayer] = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(f"combining {name}", done / len(names))
        tensors[name], layer = _combine_layer(name, adapters, weights, recipe)
        layers.append(layer)
    checkpoint = assemble(tensors, like=_common_notes(adapters))
    return CombinedAdapter(checkpoint, tuple(layers), recipe, weights)


def effective_point(adapter: AdapterCheckpoint, name: str) -> LoRAPoint:
    """Return a module's pair ``(s * lora_B, lora_A)``, in float32 at least.

    Half precision is raised, since the scaled factor would not fit into it.
    """
    pair = adapter.tensors[name]
    dtype = torch.promote_types(pair.lora_A.dtype, torch.float32)
    scaled = pair.lora_B.detach().to(torch.float64) * adapter.config.scaling_for(name)
    return LoRAPoint(scaled.to(dtype), pair.lora_A.detach().to(dtype))


def parameters(adapter: AdapterCheckpoint) -> int:
    """Count the numbers that an adapter stores."""
    return sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in adapter.tensors.values())


def _check_module(name: str, adapters: Sequence[AdapterCheckpoint], recipe: Recipe) -> None:
    shapes = {}
    for index, adapter in enumerate(adapters):
        told = f"adapter {index + 1} ({adapter.path})"
        if name in adapter.tensors:
            pair = adapter.tensors[name]
            shapes[told] = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        elif recipe.method in MEANS:
            raise AdapterMismatchError(
                f"{name!r} has no factors in {told}, and the method {recipe.method!r} averages "
                "those of all.",
                hint='Take the method "exact", for which an absent module is a zero.',
            )
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} in {told}" for told, shape in shapes.items())
        raise AdapterMismatchError(
            f"the update of {name!r} has different shapes (out, in): {listed}.",
            hint="Adapters of different base models cannot be combined.",
        )


def _combine_layer(
    name: str, adapters: Sequence[AdapterCheckpoint], weights: Sequence[float], recipe: Recipe
) -> tuple[LoRAPair, CombinedLayer]:
    having = [index for index, adapter in enumerate(adapters) if name in adapter.tensors]
    points = [effective_point(adapters[index], name) for index in having]
    dtype = adapters[having[0]].tensors[name].lora_A.dtype
    for index in having[1:]:
        dtype = torch.promote_types(dtype, adapters[index].tensors[name].lora_A.dtype)
    try:
        found = combine_points(
            points, [weights[index] for index in having], recipe, dtype=dtype, label=name
        )
    except GaugeError as error:
        raise type(error)(f"{name}: {error.message}", hint=error.hint) from error
    pair = LoRAPair(lora_A=found.point.A, lora_B=found.point.B)
    return pair, CombinedLayer(
        name=name,
        shape=found.point.shape,
        ranks=tuple(point.rank for point in points),
        rank=found.point.rank,
        norm=float(found.norm),
        truncation=float(found.truncation),
        deviation=float(found.deviation),
    )


def _warn_of_bases(adapters: Sequence[AdapterCheckpoint]) -> None:
    bases = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    if len(bases) > 1:
        told = ", ".join(sorted(str(base) for base in bases))
        warnings.warn(
            f"the adapters name different base models: {told}. If these are not one model under "
            "several names, their updates should not be added.",
            stacklevel=4,
        )


def _common_notes(adapters: Sequence[AdapterCheckpoint]) -> LoRAConfig:
    """Return a config with the notes that all adapters agree on."""
    first = adapters[0].config
    configs = [adapter.config for adapter in adapters[1:]]
    agreed: dict[str, Any] = {
        name: getattr(first, name)
        for name in ("dropout", "task_type", "base_model_name_or_path")
        if all(getattr(config, name) == getattr(first, name) for config in configs)
    }
    agreed["extra"] = {
        name: value
        for name, value in first.extra.items()
        if all(name in config.extra and config.extra[name] == value for config in configs)
    }
    return LoRAConfig(**agreed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
