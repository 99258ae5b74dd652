"""The linear layers of an ONNX graph: which weight each multiplies with, and what it was called.

An exporter may keep a weight's name and layout (``(out, in)``, with ``Gemm(transB=1)`` or with a
``Transpose`` before ``MatMul``), fold the transposition into a nameless copy (``val_60``,
``onnx::MatMul_844``), or block-quantize it (``MatMulNBits``). What says which parameter it was is
then left in other places; all of them are gathered here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
_THROUGH = {"Identity", "Cast"}


@dataclass(frozen=True)
class Blocks:
    """How ``com.microsoft.MatMulNBits`` stores a weight.

    Attributes:
        bits: Of a code.
        size: Codes that share a scale.
        rows: N, out.
        columns: K, in.
        scales: Initializer of the scales.
        zero_points: Initializer of the zero points; None where all are in the middle.
        reason: Why it cannot be changed, None if it can.
    """

    bits: int
    size: int
    rows: int
    columns: int
    scales: str
    zero_points: str | None
    reason: str | None


@dataclass(frozen=True)
class Site:
    """A node that multiplies with a constant weight.

    Attributes:
        node: Its name, or its kind and output where it has none.
        tensor: The initializer.
        transposed: Whether the weight lies ``(in, out)``.
        shape: ``(out, in)``.
        paths: Kind of evidence -> paths that the layer may have in the torch model.
        blocks: How it is quantized, None for floating point.
    """

    node: str
    tensor: str
    transposed: bool
    shape: tuple[int, int]
    paths: dict[str, tuple[str, ...]]
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Sites:
    """All linear layers of a graph.

    Attributes:
        sites: In the order of the graph.
        other_uses: Initializer -> what else reads it: embeddings, inner graphs, outputs.
    """

    sites: tuple[Site, ...]
    other_uses: dict[str, tuple[str, ...]]


def find_sites(file: OnnxFile) -> Sites:
    """Finds the linear layers of a graph."""
    return _Finder(file).find()


class _Finder:
    def __init__(self, file: OnnxFile) -> None:
        graph = file.model.graph
        self._file, self._graph = file, graph
        self._producers = {out: node for node in graph.node for out in node.output if out}
        self._uses: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._uses.setdefault(name, []).append(node)
        self._inner = set(_inner_names(graph.node))
        self._outputs = {value.name for value in graph.output}
        notes = {value.name: _notes(value) for value in graph.value_info}
        for tensor in graph.initializer:
            notes.setdefault(tensor.name, {}).update(_notes(tensor))
        self._folded = {
            name: _names(said[_FOLDED]) for name, said in notes.items() if _FOLDED in said
        }
        self._parameters = _parameters(file.metadata)

    def find(self) -> Sites:
        sites, at = [], set()
        for node in self._graph.node:
            if (site := self._site(node)) is not None:
                sites.append(site)
                at.add(id(node))
        others = {name: self._others(name, at) for name in {site.tensor for site in sites}}
        return Sites(tuple(sites), {name: uses for name, uses in others.items() if uses})

    def _site(self, node: onnx.NodeProto) -> Site | None:
        if len(node.input) < 2:
            return None
        said = {entry.name: entry for entry in node.attribute}

        def number(name: str, default: int = 0) -> int:
            return int(said[name].i) if name in said else default

        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            return self._quantized(node, number)
        if node.op_type == "MatMul" and node.domain in {"", "ai.onnx"}:
            flipped = True
        elif node.op_type == "Gemm" or (node.op_type == "FusedMatMul" and node.domain):
            plain = not number("transA") and not number("transBatchA") + number("transBatchB")
            if not plain or ("alpha" in said and said["alpha"].f != 1.0):
                return None
            flipped = not number("transB")
        else:
            return None
        name: str = node.input[1]
        while name not in self._file.initializers:
            step = self._producers.get(name)
            if (
                step is None
                or not step.input
                or not (step.op_type in _THROUGH or _is_transpose(step))
            ):
                return None
            flipped ^= step.op_type == "Transpose"
            name = step.input[0]
        dims = self._file.initializers[name].dims
        if len(dims) != 2:
            return None
        shape = (dims[1], dims[0]) if flipped else (dims[0], dims[1])
        return Site(_label(node), name, flipped, shape, self._paths(node, name))

    def _quantized(self, node: onnx.NodeProto, number: Callable[..., int]) -> Site | None:
        inputs = [*node.input, "", "", ""]
        names = [inputs[1], inputs[2], *([inputs[3]] if inputs[3] else [])]
        if any(name not in self._file.initializers for name in names):
            return None
        bits, size = number("bits", 4), number("block_size")
        rows, columns = number("N"), number("K")
        reason = None
        if inputs[4]:
            reason = "its columns are reordered (g_idx)"
        elif bits not in {4, 8}:
            reason = f"its codes have {bits} bits, and 4 and 8 can be changed"
        elif size < 16 or size & (size - 1) or rows < 1 or columns < 1:
            reason = f"its attributes contradict each other (N={rows}, K={columns}, block={size})"
        blocks = Blocks(bits, size, rows, columns, names[1], inputs[3] or None, reason)
        paths = self._paths(node, names[0])
        return Site(_label(node), names[0], False, (rows, columns), paths, blocks)

    def _paths(self, node: onnx.NodeProto, tensor: str) -> dict[str, tuple[str, ...]]:
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

    def _others(self, tensor: str, at: set[int]) -> tuple[str, ...]:
        """Uses of a weight, also of its transpose, that are no linear layer."""
        found, waiting, seen = [], [tensor], set()
        while waiting:
            name = waiting.pop()
            if name in self._inner:
                found.append("an inner graph")
            if name in self._outputs:
                found.append("an output of the graph")
            for node in self._uses.get(name, ()):
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if id(node) in at:
                    continue
                if node.op_type in _THROUGH or _is_transpose(node):
                    waiting += node.output
                else:
                    found.append(f"{node.op_type} {_label(node)}")
        return tuple(found)


def _inner_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Every name that graphs within nodes read."""
    for node in nodes:
        for entry in node.attribute:
            for graph in [*([entry.g] if entry.HasField("g") else []), *entry.graphs]:
                for inner in graph.node:
                    yield from inner.input
                yield from (value.name for value in graph.output)
                yield from _inner_names(graph.node)


def _is_transpose(node: onnx.NodeProto) -> bool:
    if node.op_type != "Transpose":
        return False
    orders = [list(entry.ints) for entry in node.attribute if entry.name == "perm"]
    return orders in ([], [[1, 0]])


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


def _label(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} -> {node.output[0] if node.output else '?'}"
