"""What of a graph takes the factors of an adapter, and so stays as it is in fewer bits.

Factors come in as they were stored, and what rounding them costs was measured when they were; the
products with them are small beside the rest. So their nodes compute in float32, whatever the base
is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gauge_ext.export.adapters.declared import model_table

if TYPE_CHECKING:
    import onnx


def adapter_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that take factors, or factors that were made wider."""
    table = model_table(model)
    factors = set() if table is None else set(table.shapes)
    found = set()
    for node in model.graph.node:  # sorted: what widens comes before what uses it
        if factors.intersection(node.input):
            found.add(node.name)
            if node.op_type in {"Cast", "DequantizeLinear"}:
                factors.update(node.output)
    return found


@contextmanager
def closed(model: onnx.ModelProto) -> Iterator[Callable[[onnx.ModelProto], None]]:
    """Turns adapter inputs into constants, in place, for a tool that would convert inputs.

    Yields:
        What makes them inputs again, in the tool's result.
    """
    import onnx

    table = model_table(model)
    names = set() if table is None else set(table.shapes)
    graph = model.graph
    inputs = [value for value in graph.input if value.name in names]
    others = [value for value in graph.input if value.name not in names]
    stored = {tensor.name for tensor in graph.initializer}
    lent = {value.name for value in inputs} - stored
    del graph.input[:]
    graph.input.extend(others)
    if table is not None:
        for name, array in table.empty(rank=1).items():
            if name in lent:
                graph.initializer.append(onnx.numpy_helper.from_array(array, name))

    def reopen(made: onnx.ModelProto) -> None:
        kept = [tensor for tensor in made.graph.initializer if tensor.name not in lent]
        del made.graph.initializer[:]
        made.graph.initializer.extend(kept)
        made.graph.input.extend(inputs)

    yield reopen
