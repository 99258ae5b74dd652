"""A graph's table of adapter inputs, held against the inputs that the graph really has.

The table lies in the metadata, where anybody can write anything; sizes that no graph has would be
allocated before a runtime refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.table import METADATA_KEY, AdapterTable

if TYPE_CHECKING:
    import onnx


def session_table(session: Any) -> AdapterTable | None:
    """The table of a graph in onnxruntime, or None where it has no adapter inputs.

    Raises:
        ConfigError: the table is not what gauge_ext writes, or the graph has other inputs.
    """
    table = AdapterTable.from_metadata(session.get_modelmeta().custom_metadata_map)
    if table is not None:
        # Inputs with a default are no inputs to onnxruntime.
        values = (*session.get_inputs(), *session.get_overridable_initializers())
        _require_declared(table, {value.name: value.shape for value in values})
    return table


def model_table(model: onnx.ModelProto) -> AdapterTable | None:
    """The table of a graph in memory, or None where it has no adapter inputs.

    Raises:
        ConfigError: the table is not what gauge_ext writes, or the graph has other inputs.
    """
    table = AdapterTable.from_metadata({entry.key: entry.value for entry in model.metadata_props})
    if table is not None:
        dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
        _require_declared(table, {name: [d.dim_value for d in dim] for name, dim in dims.items()})
    return table


def _require_declared(table: AdapterTable, declared: Mapping[str, Sequence[Any]]) -> None:
    for name, (shape, _) in table.shapes.items():
        found = list(declared.get(name, ()))
        fits = len(found) == len(shape) and all(
            isinstance(size, str) or size == other for size, other in zip(shape, found, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"the metadata {METADATA_KEY} speaks of an input {name} {list(shape)}, and the "
                f"graph has {found if name in declared else 'none'}.",
                hint="Export the graph again with mode='adapters'.",
            )
