"""The hash of an adapter's mathematics, from plain memory: it needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple


class HashedFactor(NamedTuple):
    """A factor for :func:`hash_factors`.

    Attributes:
        shape: Its shape.
        float64: Its numbers in float64, row by row, as anything that is a buffer.
    """

    shape: tuple[int, ...]
    float64: Any


def hash_factors(modules: Iterable[tuple[str, float, Iterable[HashedFactor]]]) -> str:
    """Return the SHA-256, in hexadecimal, over modules in the order given.

    Args:
        modules: Path, scaling and factors of each, see
            :func:`~gauge_ext.checkpoint.adapter_digest`.
    """
    digest = hashlib.sha256()
    for name, scaling, factors in modules:
        digest.update(f"{name}\0{scaling.hex()}\0".encode())
        for shape, float64 in factors:
            digest.update(f"{tuple(shape)}\0".encode())
            digest.update(float64)
    return digest.hexdigest()
