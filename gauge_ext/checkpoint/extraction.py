"""What comes of a full fine-tune: an adapter, and an account of what it misses."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.checkpoint.write import write_adapter


@dataclass(frozen=True)
class ExtractedLayer:
    """What became of one layer's change D = W_1 - W_0.

    Attributes:
        name: Path of the module.
        shape: (out, in).
        rank: Of the update X that stands for D.
        norm: ||D||_F.
        relative: ||D||_F / ||W_0||_F; infinite where W_0 is zero.
        unexplained: ||D - X||_F^2 / ||D||_F^2, before X is rounded to the adapter's dtype.
        unexplained_output: The same share of the mean squared change of the layer's outputs, where
            inputs were given; None elsewhere.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative: float
    unexplained: float
    unexplained_output: float | None


@dataclass(frozen=True)
class Extraction:
    """An adapter taken from a fine-tune, and what it leaves behind.

    Attributes:
        adapter: The adapter, with scaling 1 everywhere.
        layers: Its layers, by path.
        unchanged: Linear layers that the fine-tune left as they were: no adapter on them.
        left_out: Tensors that changed and are not linear layers to be adapted -> why they are lost;
            the base with the adapter lacks those changes.
    """

    adapter: AdapterCheckpoint
    layers: tuple[ExtractedLayer, ...]
    unchanged: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def unexplained(self) -> float:
        """The share of the squared change of all adapted layers together that is not explained."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        return math.fsum(layer.unexplained * layer.norm**2 for layer in self.layers) / total

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the adapter in PEFT's format; see :func:`~gauge_ext.checkpoint.write_adapter`."""
        return write_adapter(self.adapter.config, self.adapter.tensors, path)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the factors as plain values."""
        finite = [{**vars(x), "shape": list(x.shape)} for x in self.layers]
        for layer in finite:
            layer["relative"] = layer["relative"] if math.isfinite(layer["relative"]) else None
        return {
            "sha256": self.adapter.sha256,
            "unexplained": self.unexplained,
            "layers": finite,
            "unchanged": list(self.unchanged),
            "left_out": dict(self.left_out),
        }
