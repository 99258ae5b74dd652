"""How far onnxruntime may be from torch before a graph is called wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gauge_ext.errors import ConfigError


@dataclass(frozen=True)
class Tolerance:
    """The bar that every floating-point output has to pass, all four parts of it.

    An output passes when, with y what torch computed and z what onnxruntime computed,

        max|z - y| <= absolute + relative * max|y|
        <y, z> / (|y| |z|) >= cosine          (where y rises above ``absolute`` at all)
        share of rows with equal argmax >= top1      (logits only)

    The error is scaled by the largest |y| and not entry by entry: an entry near zero is a sum of
    terms that cancel, and its rounding error is that of the terms. Integer and boolean outputs
    have to be equal; no tolerance applies to them.

    Args:
        absolute: Error allowed whatever the output's size, >= 0.
        relative: Error allowed for each unit of max|y|, >= 0.
        cosine: Least cosine similarity between the flattened outputs, in [-1, 1].
        top1: Least share of rows of logits whose largest entry stays the largest, in [0, 1].

    Raises:
        ConfigError: a value outside its range, or not a number.
    """

    absolute: float = 1e-5
    relative: float = 1e-4
    cosine: float = 0.99999
    top1: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("absolute", 0.0, math.inf),
            ("relative", 0.0, math.inf),
            ("cosine", -1.0, 1.0),
            ("top1", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise ConfigError(
                    f"tolerance: {name} must be a number in [{low:g}, {high:g}], got {value!r}."
                )

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> Tolerance:
        """The tolerance used when none is given: what rounding alone explains, and little more.

        Both sides do the same operations, in another order and with other kernels (fused
        attention, polynomial erf and exp), so they part by a multiple of the dtype's epsilon that
        grows slowly with depth.

        Args:
            dtype: A floating-point dtype; float16, float32 or float64.

        Returns:
            - float32 (eps 1.2e-7): 1e-4 of the largest output, about 800 eps. Measured: 3e-6 for a
              six-layer encoder, 1e-4 for thirty decoder layers with logits of size 20.
            - float64 (eps 2.2e-16): 1e-9, not a multiple of eps, because ONNX keeps attributes
              such as the epsilon of a layer norm in float32.
            - float16 (eps 9.8e-4): 1e-2 of the largest output, about 10 eps: onnxruntime's CPU
              kernels round to float16 at other places than torch's do.
        """
        if dtype == torch.float64:
            return cls(absolute=1e-10, relative=1e-9, cosine=1 - 1e-12)
        if dtype == torch.float16:
            return cls(absolute=2e-3, relative=1e-2, cosine=0.999)
        return cls()

    @classmethod
    def within(cls, error: float) -> Tolerance:
        """One number for everything: ``error`` absolute and relative, cosine >= 1 - error.

        Raises:
            ConfigError: ``error`` is negative or not a number.
        """
        return cls(absolute=error, relative=error, cosine=max(-1.0, 1.0 - error))

    def limit(self, peak: float) -> float:
        """The largest error allowed for an output whose largest entry is ``peak``."""
        return self.absolute + self.relative * peak
