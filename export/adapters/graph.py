"""A base graph whose linear layers take the factors of an adapter as inputs.

The layers of a copy are taught to use two more parameters (:mod:`layers`), the copy is traced like
any other model, and the two parameters become inputs of the graph.
"""

from __future__ import annotations

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.adapters.codes import PRECISIONS, AdapterPrecision
from gauge_ext.export.adapters.layers import Opened
from gauge_ext.export.adapters.table import (
    FORMS,
    METADATA_KEY,
    AdapterForm,
    AdapterInput,
    AdapterTable,
)
from gauge_ext.export.trace.graph import Graph


def require_choice(
    form: str, precision: str | None, compute: str = "float32"
) -> tuple[AdapterForm, AdapterPrecision]:
    """Checks ``adapter_form`` and ``adapter_precision``; None is the layers' own dtype.

    Raises:
        ConfigError: one is not among the choices.
    """
    stored = compute if precision is None else precision
    if stored in ("bfloat16", "bf16"):
        raise ConfigError(
            "adapter_precision: onnxruntime takes bfloat16 tensors, but numpy has no such dtype to "
            "feed them with.",
            hint="Use 'float16', which keeps three more bits.",
        )
    for name, value, choices in (
        ("adapter_form", form, FORMS),
        ("adapter_precision", stored, PRECISIONS),
    ):
        if value not in choices:
            raise ConfigError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
            )
    return (
        next(choice for choice in FORMS if choice == form),
        next(choice for choice in PRECISIONS if choice == stored),
    )


def open_inputs(
    graph: Graph,
    opened: Opened,
    form: AdapterForm,
    precision: AdapterPrecision,
    base: str,
    *,
    part: bool = False,
) -> tuple[Graph, AdapterTable]:
    """Makes inputs of the factors of a traced graph, and says in the metadata whose they are.

    Args:
        graph: The graph of ``opened.model``; changed in place.
        opened: What it was traced from.
        form: Whether the inputs have defaults of rank 0.
        precision: How the factors are stored; the graph turns them into the layers' dtype.
        base: The base's SHA-256.
        part: Whether layers that are not part of the graph are in another graph of the model.

    Returns:
        The graph, whose parameters no longer count the factors; the table.

    Raises:
        ExportError: a layer is not part of the graph, or uses a factor in an unknown way.
    """
    inputs = {}
    for name, entry in opened.inputs.items():
        values = [graph.model.graph.initializers.get(key) for key in (entry.lora_A, entry.lora_B)]
        if None not in values:
            inputs[name] = entry
    unused = tuple(name for name in opened.inputs if name not in inputs)
    if unused and not part:
        raise ExportError(
            f"{len(unused)} of the layers that are to take an adapter are not part of the graph, "
            f"the first of them {unused[0]!r}: no output depends on them.",
            hint="Leave them out of adapter_targets, or export outputs that need them.",
        )
    table = AdapterTable(form, precision, opened.compute, base, inputs, unused)
    for entry in inputs.values():
        _name_rank(graph, entry)
        for name in (entry.lora_A, entry.lora_B):
            _make_input(graph, name, table)
    graph.model.metadata_props[METADATA_KEY] = table.to_json()
    factors = {key for entry in inputs.values() for key in (entry.lora_A, entry.lora_B)}
    kept = {key: names for key, names in graph.parameters.items() if key not in factors}
    return Graph(graph.model, kept, graph.bounds), table


def _name_rank(graph: Graph, entry: AdapterInput) -> None:
    """Writes the name of the rank where the traced one stands: in x A, the only such value."""
    import onnx_ir as ir

    value = graph.model.graph.initializers[entry.lora_A]
    for node, _ in value.uses():
        hidden = node.outputs[0]
        if node.op_type not in {"MatMul", "Gemm"} or any(
            user.op_type not in {"MatMul", "Gemm"} for user, _ in hidden.uses()
        ):
            raise ExportError(
                f"torch wrote the adapter of {entry.module!r} with {node.op_type} nodes that this "
                "version of gauge_ext does not know.",
                hint="Export with mode='merged'.",
            )
        if hidden.shape is not None:
            hidden.shape = ir.Shape([*hidden.shape[:-1], entry.rank])


def _make_input(graph: Graph, name: str, table: AdapterTable) -> None:
    import onnx_ir as ir

    inner = graph.model.graph
    value = inner.initializers.pop(name)
    value.const_value = None
    shape, stored = table.shapes[name]
    value.shape = ir.Shape(shape)
    axis = next(i for i, size in enumerate(shape) if isinstance(size, str))
    compute = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16"}[table.compute]]
    added = [value]
    if stored.name != table.compute:
        users = list(value.uses())
        if stored.kind == "f":
            node = ir.node("Cast", [value], {"to": compute.value})
        else:
            scale = ir.Value(
                name=f"{name}.scale",
                shape=ir.Shape([shape[axis]]),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            added.append(scale)
            node = ir.node("DequantizeLinear", [value, scale], {"axis": axis})
        nodes = [node]
        if stored.kind != "f" and compute != ir.DataType.FLOAT:
            nodes.append(ir.node("Cast", [node.outputs[0]], {"to": compute.value}))
        out = nodes[-1].outputs[0]
        for number, step in enumerate(nodes):
            step.outputs[0].name = f"{name}.wide{number or ''}"
            step.outputs[0].shape = ir.Shape(shape)
        for user, index in users:
            user.replace_input_with(index, out)
        inner.insert_before(users[0][0], nodes)
        out.type = ir.TensorType(compute)
    value.type = ir.TensorType(ir.DataType.from_numpy(stored))
    defaults = table.empty()
    for one in added:
        if table.form == "optional":
            one.const_value = ir.tensor(defaults[str(one.name)], name=one.name)
            inner.register_initializer(one)
        inner.inputs.append(one)
