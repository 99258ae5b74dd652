"""Made-up inputs for a graph of which nothing is known but itself; in numpy alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gauge_ext.export.disk.numbers import Array
from gauge_ext.export.trace.expressions import evaluate

if TYPE_CHECKING:
    import onnx

_BATCH, _PAST, _OTHER = 2, 3, 5


def random_feeds(
    graph: onnx.GraphProto, *, skip: Collection[str] = (), seed: int = 0
) -> dict[str, Array]:
    """Values for every input that has none.

    Masks are ones, positions count up, indices of an embedding stay below its rows, other integers
    are 0 or 1, floats are normal. Sizes with one name are one size.

    Args:
        graph: The graph.
        skip: Inputs that are fed otherwise.
        seed: Of the values.
    """
    from onnx import helper

    generator = np.random.default_rng(seed)
    known = {tensor.name for tensor in graph.initializer} | set(skip)
    rows = _indexed_rows(graph)
    sizes: dict[str, int] = {}
    feeds = {}
    for value in graph.input:
        if value.name in known:
            continue
        tensor = value.type.tensor_type
        shape = [_size(dim, axis, sizes) for axis, dim in enumerate(tensor.shape.dim)]
        kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = _values(value.name, kind, shape, rows, generator)
    return feeds


def _size(dim: onnx.TensorShapeProto.Dimension, axis: int, sizes: dict[str, int]) -> int:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    name = dim.dim_param
    if not name:
        return _BATCH if axis == 0 else _OTHER
    if name not in sizes:
        low = name.lower()
        if "batch" in low:
            sizes[name] = _BATCH
        elif "total" in low:  # what went before and what is new
            sizes[name] = _PAST + _OTHER
        elif name.isidentifier():
            sizes[name] = _PAST if "past" in low else _OTHER
        else:
            try:
                return evaluate(name, sizes)
            except ValueError:
                sizes[name] = _PAST + _OTHER
    return sizes[name]


def _indexed_rows(graph: onnx.GraphProto) -> dict[str, int]:
    """Input -> the rows of the table that it looks up."""
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    for value in graph.input:
        if dims := value.type.tensor_type.shape.dim:
            tables.setdefault(value.name, dims[0].dim_value)
    return {
        node.input[1]: tables[node.input[0]]
        for node in graph.node
        if node.op_type in {"Gather", "GatherBlockQuantized"} and node.input[0] in tables
    }


def _values(
    name: str,
    kind: np.dtype[np.generic],
    shape: list[int],
    rows: Mapping[str, int],
    generator: np.random.Generator,
) -> Array:
    found: Array
    if kind.kind == "b" or "mask" in name:
        found = np.ones(shape)
    elif kind.kind in "iu":
        if "position" in name and shape:
            found = np.broadcast_to(np.arange(shape[-1]), shape)
        else:
            found = generator.integers(0, rows.get(name, 2), shape)
    else:
        found = generator.standard_normal(shape)
    return np.ascontiguousarray(found.astype(kind))
