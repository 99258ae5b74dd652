"""The dynamic axes of a traced graph: their names, and the sizes that they may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gauge_ext.export.trace.inputs import Axes, Bounds, axis_names, bounds_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


def name_axes(program: torch.onnx.ONNXProgram, axes: list[Axes]) -> Bounds:
    """Gives dynamic axes their names, and says which sizes the model takes.

    torch.onnx traces with deferred assertions: an axis that the model fixes may still be a symbol,
    of which torch knows that it has one value only. It becomes a number here.

    Args:
        program: The traced program; its shapes are changed in place.
        axes: What the user said about each input.

    Returns:
        Name -> least and largest size, as far as the user or torch knows.
    """
    assert program.exported_program is not None  # only hand-made programs have none
    ranges = {str(k): v for k, v in program.exported_program.range_constraints.items()}
    asked = bounds_of(axes)
    bounds: Bounds = {}
    names: dict[str | ir.SymbolicDim, str] = {}
    for value, entry in zip(program.model.graph.inputs, axes, strict=True):
        for axis, name in axis_names(entry).items():
            size = value.shape[axis] if value.shape is not None else None
            symbol = getattr(size, "value", None)
            # An axis that follows from others keeps its formula; two axes that the model makes
            # equal are one symbol, and have the first name.
            if not isinstance(symbol, str) or not symbol.isidentifier() or symbol in names:
                continue
            low, high = asked.get(name, (1, None))
            if symbol in ranges:
                # torch writes 2 for "not a constant"; whether 0 and 1 work is for us to try.
                least, most = _integer(ranges[symbol].lower), _integer(ranges[symbol].upper)
                low = least if least is not None and least > 2 else low
                high = most
            names[symbol] = str(high) if low == high else name
            bounds[name] = (low, high)
    program.rename_axes(names)
    _fix_axes(program.model)
    return {name: limits for name, limits in bounds.items() if name in names.values()}


def _fix_axes(model: ir.Model) -> None:
    """Makes numbers of axes that are named by a number: those that may take one size only."""
    from onnx_ir.traversal import RecursiveGraphIterator

    values = [*model.graph.inputs]
    for node in RecursiveGraphIterator(model.graph):
        values += node.outputs
    for shape in (value.shape for value in values if value.shape is not None):
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and str(size.value).isdigit():
                shape[axis] = int(str(size.value))


def _integer(number: Any) -> int | None:
    """A sympy integer as Python's; None for infinity."""
    return int(number) if getattr(number, "is_Integer", False) else None
