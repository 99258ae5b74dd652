"""The headers of safetensors files: what is in them and where, with nothing loaded.

Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gauge_ext.errors import ConfigError, GaugeError
from gauge_ext.export.disk.spans import Span

_MAX_HEADER = 100_000_000  # the format's own limit
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "C64": 64,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        dtype: Its dtype in the file's words, such as ``BF16``.
        shape: Its shape.
        span: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    span: Span


def read_header(path: Path, error: type[GaugeError] = ConfigError) -> dict[str, Stored]:
    """Reads what a safetensors file holds.

    Args:
        path: The file.
        error: What is raised.

    Returns:
        Name -> where it lies.

    Raises:
        ConfigError: it is missing, cut short, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
        _check_places(found, 8 + length, size)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}.") from cause
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as cause:
        raise error(
            f"{path} is not a whole safetensors file: {cause}.",
            hint="Copy or download it again; it may have been cut short.",
        ) from cause
    return found


def _entry(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"a tensor has the shape {list(shape)} and the place {first}..{last}")
    if dtype in _BITS and (math.prod(shape) * _BITS[dtype] + 7) // 8 != last - first:
        raise ValueError(f"a tensor of shape {list(shape)} and {dtype} has {last - first} bytes")
    return Stored(dtype, shape, Span(path, start + first, last - first))


def _check_places(found: dict[str, Stored], start: int, size: int) -> None:
    spans = sorted(stored.span for stored in found.values())
    if any(a.end > b.offset for a, b in pairwise(spans)):
        raise ValueError("two tensors overlap")
    end = max((span.end for span in spans), default=start)
    if end != size:
        raise ValueError(f"it should have {end} bytes and has {size}")
