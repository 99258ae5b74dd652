"""When two adapters are the same update, however it is factored: a sketch that no gauge changes.

Two adapters with the same products B A may share no number of their factors. A random projection of
each product from both sides is a function of the product alone, costs O((m + n) r) and is small
enough to keep for every adapter of a collection. (The sha256 of an adapter is about its bytes, and
changes with the gauge.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import linalg
from gauge_ext.geometry.point import LoRAPoint

# Part of every seed; to be raised when a change here changes the numbers.
_VERSION = 1
_BITS = 64
# Steps of the norm within a key, per doubling: 2.2% each.
_NORM_STEPS = 32


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A gauge-invariant sketch of an adapter.

    Attributes:
        sketches: Layer -> ``(size, size)`` float64.
        shapes: Layer -> (m, n), the shape of its update.
        norms: Layer -> the Frobenius norm of its update, exact.
        size: k, the side of a sketch.
        key: A short text for a table of known adapters: which layers, 64 signs of random
            projections of all sketches together, and the total norm in steps of 2%. Equal updates
            have equal keys unless rounding meets one of the 65 boundaries: about one pair in ten
            thousand for float32 factors, one in three for bfloat16. Keys of unrelated adapters
            differ in half of the 64 bits; equal keys are a reason to look at :meth:`distance`.
    """

    sketches: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    norms: Mapping[str, float]
    size: int
    key: str

    @property
    def norm(self) -> float:
        """The Frobenius norm of all updates together, exact."""
        return math.hypot(*self.norms.values())

    def cosine(self, other: Fingerprint) -> float:
        """Estimate the cosine of the angle between two adapters, all their layers together.

        1 for updates that are positive multiples of each other, about 0 for unrelated ones. The
        error of the estimate falls with the number of layers and with ``size``. Layers that only
        one of the two has, or has with another shape, are orthogonal to everything.

        Returns:
            A number in [-1, 1]; 1 for two updates of zeros, 0 for one.

        Raises:
            GeometryError: The sketches have different sizes.
        """
        dot, mine, theirs = self._products(other)
        if mine == 0.0 or theirs == 0.0:
            return 1.0 if mine == theirs else 0.0
        return max(-1.0, min(1.0, dot / math.sqrt(mine * theirs)))

    def distance(self, other: Fingerprint) -> float:
        r"""Estimate :math:`\|X - Y\|_F / \max(\|X\|_F, \|Y\|_F)`, all layers together.

        Rounding of the factors leaves about 1e-6 in float32 and 1e-2 in bfloat16; unrelated
        adapters are about sqrt(2) apart at equal norms.

        Returns:
            A number from 0 up; 0 for two updates of zeros.

        Raises:
            GeometryError: The sketches have different sizes.
        """
        self._require_comparable(other)
        square, mine, theirs = 0.0, 0.0, 0.0
        for name in {**self.sketches, **other.sketches}:
            x, y = self.sketches.get(name), other.sketches.get(name)
            if x is not None and y is not None and self.shapes[name] == other.shapes[name]:
                square += float((x - y).square().sum())
            else:
                square += _energy(() if x is None else (x,)) + _energy(() if y is None else (y,))
        mine, theirs = _energy(self.sketches.values()), _energy(other.sketches.values())
        largest = max(mine, theirs)
        return math.sqrt(square / largest) if largest > 0.0 else 0.0

    def _products(self, other: Fingerprint) -> tuple[float, float, float]:
        self._require_comparable(other)
        dot = math.fsum(
            float((sketch * other.sketches[name]).sum())
            for name, sketch in self.sketches.items()
            if name in other.sketches and self.shapes[name] == other.shapes[name]
        )
        return dot, _energy(self.sketches.values()), _energy(other.sketches.values())

    def _require_comparable(self, other: Fingerprint) -> None:
        if self.size != other.size:
            raise GeometryError(
                f"fingerprints of different sizes cannot be compared, got {self.size} and "
                f"{other.size}.",
                hint="Make both with the same size.",
            )


def fingerprint_points(points: Mapping[str, LoRAPoint], *, size: int = 16) -> Fingerprint:
    r"""Sketch adapters layer by layer: :math:`(\Omega^T B)(A \Psi) / k`, with k = ``size``.

    The entries of :math:`\Omega` (m, k) and :math:`\Psi` (n, k) are independent random signs, so
    that inner products of sketches are unbiased estimates of those of the updates. (Normal numbers
    would do as well; signs are drawn from SHAKE-256 of the layer's name and are the same on every
    machine and with every version of torch.)

    Args:
        points: Layer -> its factors, without batch dimensions.
        size: k; 8 k² bytes are kept for each layer.

    Raises:
        ConfigError: ``size`` is not at least 1.
        GeometryError: There are no points, or one has batch dimensions.
        NonFiniteError: A factor holds NaN or infinity.

    Source:
        Achlioptas, Database-friendly random projections, 2003 (signs); Charikar, Similarity
        estimation techniques from rounding algorithms, 2002 (the key's bits).
    """
    if size < 1:
        raise ConfigError(f"size must be at least 1, got {size}.")
    if not points:
        raise GeometryError("a fingerprint needs the factors of at least one layer, got none.")
    sketches, norms = {}, {}
    for name, point in sorted(points.items()):
        if point.batch_shape:
            raise GeometryError(
                f"the factors of {name!r} have batch dimensions, {tuple(point.batch_shape)}.",
                hint="Give each entry of the batch a name of its own.",
            )
        b = linalg.to_double(point.B.detach()).cpu()
        a = linalg.to_double(point.A.detach()).cpu()
        if not bool(b.isfinite().all() and a.isfinite().all()):
            raise NonFiniteError(f"the factors of {name!r} hold NaN or infinity.")
        m, n = point.shape
        left, right = _signs(f"left\0{name}", m, size), _signs(f"right\0{name}", n, size)
        sketches[name] = (left.mT @ b) @ (a @ right) / size
        norms[name] = float(linalg.product_singular_values(b, a).norm())
    shapes = {name: points[name].shape for name in sketches}
    return Fingerprint(sketches, shapes, norms, size, _key(sketches, shapes, norms, size))


def _key(
    sketches: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    norms: Mapping[str, float],
    size: int,
) -> str:
    layers = "\0".join(f"{name}\0{shapes[name]}" for name in sketches)
    where = hashlib.sha256(f"{_VERSION}\0{size}\0{layers}".encode()).hexdigest()[:8]
    projections = torch.zeros(_BITS, dtype=torch.float64)
    for name, sketch in sketches.items():
        projections += _signs(f"key\0{name}", _BITS, size * size) @ sketch.flatten()
    bits = sum(1 << i for i, value in enumerate(projections.tolist()) if value > 0)
    norm = math.hypot(*norms.values())
    step = f"{round(_NORM_STEPS * math.log2(norm)):+d}" if norm > 0.0 else "zero"
    return f"{where}-{bits:016x}-{step}"


def _signs(label: str, rows: int, columns: int) -> Tensor:
    """Independent random signs ``(rows, columns)`` in float64, a function of the arguments."""
    count = rows * columns
    seed = f"gauge_ext fingerprint {_VERSION}\0{label}\0{rows}\0{columns}"
    drawn = hashlib.shake_256(seed.encode()).digest((count + 7) // 8)
    packed = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return (2.0 * bits.flatten()[:count].double() - 1.0).view(rows, columns)


def _energy(sketches: Iterable[Tensor]) -> float:
    return math.fsum(float(sketch.square().sum()) for sketch in sketches)
