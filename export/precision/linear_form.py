"""Graphs brought into the form that the methods for integers know: MatMul with a constant.

Our graphs keep a layer's weight in torch's layout, behind a Transpose or in a Gemm. Here it comes
to lie as ``(in, out)`` under the name of the parameter.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def fold_transposes(model: onnx.ModelProto) -> None:
    """Replaces ``Transpose(weight)`` by the transposed weight.

    It has the same name where nothing else uses the weight, else the suffix ``.transposed``.
    """
    import onnx

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    uses = Counter(name for node in graph.node for name in node.input)
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        name = node.input[0] if node.input else ""
        if node.op_type != "Transpose" or name not in weights or name in inputs:
            continue
        order = [list(a.ints) for a in node.attribute if a.name == "perm"]
        array = np.ascontiguousarray(
            np.transpose(onnx.numpy_helper.to_array(weights[name]), *order)
        )
        alone = uses[name] == 1
        folded = onnx.numpy_helper.from_array(array, name if alone else f"{name}.transposed")
        if alone:
            weights[name].CopyFrom(folded)
        elif folded.name not in weights:
            graph.initializer.append(folded)
            weights[folded.name] = graph.initializer[-1]
        renamed[node.output[0]] = folded.name
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    _forget(model, {*renamed, *renamed.values()})


def unfold_gemms(model: onnx.ModelProto) -> None:
    """Writes a Gemm of a weight as MatMul and Add, which the methods know."""
    import onnx

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    uses = Counter(name for node in graph.node for name in node.input)
    nodes = []
    turned = set()
    for node in graph.node:
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        name = node.input[1] if node.op_type == "Gemm" else ""
        plain = said.get("alpha", 1.0) == said.get("beta", 1.0) == 1.0 and not said.get("transA")
        turn = bool(said.get("transB"))
        if name not in weights or name in inputs or not plain or (turn and uses[name] > 1):
            nodes.append(node)
            continue
        if turn:
            array = np.ascontiguousarray(onnx.numpy_helper.to_array(weights[name]).T)
            weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
            turned.add(name)
        product = f"{node.output[0]}.product" if len(node.input) > 2 else node.output[0]
        matmul = onnx.helper.make_node("MatMul", node.input[:2], [product], name=node.name)
        nodes.append(matmul)
        if len(node.input) > 2:
            add = [product, node.input[2]]
            nodes.append(onnx.helper.make_node("Add", add, node.output, name=f"{node.name}.bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    _forget(model, turned)


def _forget(model: onnx.ModelProto, names: set[str]) -> None:
    """Drops notes on the shapes of weights that were turned, and of values that are gone."""
    graph = model.graph
    noted = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(noted)
