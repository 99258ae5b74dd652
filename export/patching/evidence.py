"""What an ONNX file says of the module that a node or a weight came from."""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING

from gauge_ext.export.disk.onnx_file import OnnxFile

if TYPE_CHECKING:
    import onnx

# Evidence for the path of a layer, the most trustworthy first.
EVIDENCE = {
    "parameters": "gauge_ext's metadata",
    "folded_from": "the optimizer's note on what was folded (folded_from)",
    "name": "the initializer's name",
    "scope": "the exporter's note on the module (name_scopes)",
    "node": "the node's name",
}
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"
_PARAMETERS = "gauge_ext.parameters"
# What quantizers put behind the name of a weight.
_QUANTIZED = re.compile(r"(_Q\d+|_q\d+|_quant|_quantized|_DQ_Q\d+)$")


class Evidence:
    """The notes of a file, by weight.

    Args:
        file: The file.
    """

    def __init__(self, file: OnnxFile) -> None:
        graph = file.model.graph
        notes = {value.name: _notes(value) for value in graph.value_info}
        for tensor in graph.initializer:
            notes.setdefault(tensor.name, {}).update(_notes(tensor))
        self._folded = {
            name: _names(said[_FOLDED]) for name, said in notes.items() if _FOLDED in said
        }
        self._parameters = _parameters(file.metadata)

    def paths(self, node: onnx.NodeProto, tensor: str) -> dict[str, tuple[str, ...]]:
        """Kind of evidence -> paths that the module of a node and its weight may have."""
        plain = _QUANTIZED.sub("", tensor)
        scopes = _names(_notes(node).get(_SCOPES, ""))
        found = {
            "parameters": self._parameters.get(tensor, ()),
            "folded_from": self._folded.get(tensor) or self._folded.get(plain, ()),
            "name": (plain,),
            # The last entry is the operation, the one before the module that it is in.
            "scope": scopes[-2:-1],
            "node": (_dotted(node.name),) if node.name.startswith("/") else (),
        }
        return {
            kind: tuple(name.removesuffix(".weight") for name in names if name)
            for kind, names in found.items()
            if any(names)
        }


def has_folded_normalization(node: onnx.NodeProto) -> bool:
    """Whether a batch normalization was multiplied into the weight of a node.

    torch.onnx.export does so by default, and leaves the weight its name: that the node calls itself
    a normalization is all that tells.
    """
    return any("batch_norm" in name for name in _names(_notes(node).get(_SCOPES, ""))[-1:])


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name, or its kind and output where it has none."""
    return node.name or f"{node.op_type} -> {node.output[0] if node.output else '?'}"


def _notes(holder: onnx.ValueInfoProto | onnx.TensorProto | onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in holder.metadata_props}


def _names(text: str) -> tuple[str, ...]:
    """A list of strings as Python prints it; empty where it is something else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def _parameters(metadata: dict[str, str]) -> dict[str, tuple[str, ...]]:
    try:
        found = json.loads(metadata.get(_PARAMETERS, "{}"))
        return {str(key): tuple(map(str, names)) for key, names in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _dotted(name: str) -> str:
    """``/encoder/layer.0/query/MatMul`` -> ``encoder.layer.0.query``."""
    return _QUANTIZED.sub("", name).strip("/").rpartition("/")[0].replace("/", ".")
