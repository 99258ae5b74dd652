"""The weights of an ONNX graph that adapters can be for, and what each was called.

An exporter may keep the name and layout of a linear layer's weight (``(out, in)``, with
``Gemm(transB=1)`` or with a ``Transpose`` before ``MatMul``), fold the transposition into a
nameless copy (``val_60``, ``onnx::MatMul_844``), or block-quantize it (``MatMulNBits``). What says
which parameter it was is then left in other places, see :mod:`evidence`. An embedding is a
``Gather``, a convolution a ``Conv``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gauge_ext.export.disk.onnx_file import OnnxFile
from gauge_ext.export.patching.evidence import Evidence, has_folded_normalization, label
from gauge_ext.export.patching.update import LayerKind

if TYPE_CHECKING:
    import onnx

_THROUGH = {"Identity", "Cast"}
_OWN_DOMAINS = {"", "ai.onnx"}


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
    """A node that multiplies with a constant weight, or looks up its rows.

    Attributes:
        node: Its name, or its kind and output where it has none.
        tensor: The initializer.
        transposed: Whether the weight lies ``(in, out)``.
        shape: ``(out, in)``; of a convolution ``(out, in · kernel)``.
        paths: Kind of evidence -> paths that the layer may have in the torch model.
        blocks: How it is quantized, None for floating point.
        kind: Of the layer.
        normalized: Whether a batch normalization was multiplied into the weight.
    """

    node: str
    tensor: str
    transposed: bool
    shape: tuple[int, int]
    paths: dict[str, tuple[str, ...]]
    blocks: Blocks | None = None
    kind: LayerKind = "linear"
    normalized: bool = False


@dataclass(frozen=True)
class Sites:
    """All layers of a graph.

    Attributes:
        sites: In the order of the graph.
        other_uses: Initializer and kind of the layer -> what else reads the initializer: layers of
            another kind, inner graphs, outputs.
    """

    sites: tuple[Site, ...]
    other_uses: dict[tuple[str, LayerKind], tuple[str, ...]]


def find_sites(file: OnnxFile) -> Sites:
    """Finds the linear layers, embeddings and convolutions of a graph."""
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
        self._evidence = Evidence(file)

    def find(self) -> Sites:
        sites: list[Site] = []
        at: dict[tuple[str, LayerKind], set[int]] = {}
        for node in self._graph.node:
            if (site := self._site(node)) is not None:
                sites.append(site)
                at.setdefault((site.tensor, site.kind), set()).add(id(node))
        others = {key: self._others(key[0], nodes) for key, nodes in at.items()}
        return Sites(tuple(sites), {key: uses for key, uses in others.items() if uses})

    def _site(self, node: onnx.NodeProto) -> Site | None:
        if len(node.input) < 2:
            return None
        said = {entry.name: entry for entry in node.attribute}

        def number(name: str, default: int = 0) -> int:
            return int(said[name].i) if name in said else default

        own = node.domain in _OWN_DOMAINS
        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            return self._quantized(node, number)
        if node.op_type == "Gather" and own and not number("axis"):
            return self._embedding(node)
        if node.op_type == "Conv" and own and number("group", 1) == 1:
            return self._convolution(node)
        if node.op_type == "MatMul" and own:
            return self._linear(node, flipped=True)
        if node.op_type == "Gemm" or (node.op_type == "FusedMatMul" and not own):
            plain = not number("transA") and not number("transBatchA") + number("transBatchB")
            if plain and ("alpha" not in said or said["alpha"].f == 1.0):
                return self._linear(node, flipped=not number("transB"))
        return None

    def _linear(self, node: onnx.NodeProto, *, flipped: bool) -> Site | None:
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
        return self._made(node, name, shape, "linear", transposed=flipped)

    def _embedding(self, node: onnx.NodeProto) -> Site | None:
        name = self._constant(node.input[0])
        dims = self._file.initializers[name].dims if name is not None else ()
        if name is None or len(dims) != 2:
            return None
        return self._made(node, name, (dims[1], dims[0]), "embedding", transposed=True)

    def _convolution(self, node: onnx.NodeProto) -> Site | None:
        name = self._constant(node.input[1])
        dims = self._file.initializers[name].dims if name is not None else ()
        if name is None or len(dims) < 3:
            return None
        return self._made(node, name, (dims[0], math.prod(dims[1:])), "convolution")

    def _made(
        self,
        node: onnx.NodeProto,
        tensor: str,
        shape: tuple[int, int],
        kind: LayerKind,
        *,
        transposed: bool = False,
    ) -> Site:
        paths = self._evidence.paths(node, tensor)
        folded = has_folded_normalization(node)
        return Site(label(node), tensor, transposed, shape, paths, kind=kind, normalized=folded)

    def _constant(self, name: str) -> str | None:
        """The initializer that a value is, but for its format."""
        while name not in self._file.initializers:
            step = self._producers.get(name)
            if step is None or step.op_type not in _THROUGH:
                return None
            name = step.input[0]
        return name

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
        paths = self._evidence.paths(node, names[0])
        return Site(label(node), names[0], False, (rows, columns), paths, blocks)

    def _others(self, tensor: str, at: set[int]) -> tuple[str, ...]:
        """Uses of a weight, also of its transpose, by other nodes than those."""
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
                    found.append(f"{node.op_type} {label(node)}")
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
