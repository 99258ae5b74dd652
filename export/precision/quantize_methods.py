"""The four ways to store weights in fewer bits, each by onnxruntime's own tools.

They work on graphs whose weights are constants of MatMul. Our graphs keep a layer's weight in
torch's layout, behind a Transpose; that is folded first, so the quantized weight lies as
``(in, out)`` under the name of the parameter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gauge_ext.errors import ConfigError, ExportError, NonFiniteError
from gauge_ext.export.tolerance import Tolerance

if TYPE_CHECKING:
    import onnx

Precision = Literal["fp32", "fp16", "int8", "int8-static", "int4"]
Feeds = Mapping[str, NDArray[Any]]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_LIMIT = 2**31 - 2**20  # onnxruntime's int8 quantizer serializes the model, and protobuf ends there
_FP16_MAX = 65504.0

# Sums over many entries and powers leave float16's range or lose its eleven bits: norms, softmax
# and the like stay in float32, beside what onnxruntime has no float16 for.
KEPT_IN_FLOAT32 = (
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LpNormalization",
    "Softmax",
    "LogSoftmax",
    "Pow",
    "Exp",
    "Log",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceProd",
)


@dataclass(frozen=True)
class QuantizationOptions:
    """How to store weights in fewer bits.

    Attributes:
        calibration: For int8-static: sets of inputs by name, whose activations give the ranges.
        block_size: For int4: how many weights share a scale, 16, 32, 64, 128 or 256.
        keep: Names of nodes, weights or kinds of nodes that stay in float32.
        reduce_range: For int8: weights of 7 bits. With 8, x86 CPUs without VNNI saturate where
            they sum two products in 16 bits, and outputs are wrong by several times the rounding.
        tolerance: How far outputs may be from those of float32. None: there is no bar, and the
            report says how far they are; NaN and infinity fail in any case.
    """

    calibration: Sequence[Feeds] = ()
    block_size: int = 32
    keep: Sequence[str] = ()
    reduce_range: bool = True
    tolerance: Tolerance | None = None


def require_precision(precision: str, options: QuantizationOptions) -> Precision:
    """Refuses what cannot be done, before any work, and returns the precision.

    Raises:
        ConfigError: the precision is unknown, cannot run, or lacks what it needs.
    """
    if precision in {"bf16", "bfloat16"}:
        raise ConfigError(
            "precision 'bf16': onnxruntime has no bfloat16 MatMul or Add for the CPU, so the file "
            "would be written and never run.",
            hint="Use 'fp16' for half the size, or 'fp32'.",
        )
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}."
        )
    if precision == "int8-static" and not options.calibration:
        raise ConfigError(
            "precision 'int8-static' takes the ranges of activations from inputs, and none are "
            "given.",
            hint="Give calibration inputs like those in use, or use 'int8', which looks at each "
            "input when it runs.",
        )
    if options.block_size not in {16, 32, 64, 128, 256}:
        raise ConfigError(f"block_size must be 16, 32, 64, 128 or 256, got {options.block_size!r}.")
    return precision


def prepare(model: onnx.ModelProto, precision: Precision) -> None:
    """Brings the weights of linear layers into the form of the methods for integers, in place."""
    if precision != "fp16":
        fold_transposes(model)
        unfold_gemms(model)


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


def convert(
    model: onnx.ModelProto, target: Path, precision: Precision, options: QuantizationOptions
) -> Any:
    """Returns a model in fewer bits.

    Args:
        model: In float32, transposes folded; used up.
        target: Where onnxruntime may write, in a folder of its own.
        precision: How.
        options: See :class:`QuantizationOptions`.

    Raises:
        NonFiniteError: a weight exceeds float16.
        ExportError: onnxruntime's tools refuse the model.
    """
    try:
        with _quiet():
            if precision == "fp16":
                return _to_fp16(model, options)
            if precision == "int4":
                return _to_int4(model, options)
            return _to_int8(model, target, options, static=precision == "int8-static")
    except (NonFiniteError, ConfigError, ExportError, OSError):
        raise
    except Exception as error:  # onnxruntime's tools raise whatever comes
        raise ExportError(
            f"onnxruntime's tools cannot bring this graph to {precision}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _to_fp16(model: onnx.ModelProto, options: QuantizationOptions) -> Any:
    import onnx
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    excluded = set(_excluded(model, options))
    used = {i for n in model.graph.node if n.name not in excluded for i in n.input}
    for tensor in model.graph.initializer:
        matrix = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
        if matrix and tensor.name in used:
            peak = float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0.0))
            # Masks are constants of -3e38, for which -65504 does as well.
            if _FP16_MAX < peak < 1e30:
                raise NonFiniteError(
                    f"{tensor.name} has an entry of size {peak:.3g}, beyond the range of float16.",
                    hint=f"Leave it in float32: keep=[{tensor.name!r}].",
                )
    kinds = {node.op_type for node in model.graph.node}
    kept = [kind for kind in (*KEPT_IN_FLOAT32, *options.keep) if kind in kinds]
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kept],
        node_block_list=sorted(excluded),
    )
    del half.graph.value_info[:]  # some say float32 of what is float16 now
    return half


def _to_int4(model: onnx.ModelProto, options: QuantizationOptions) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=options.block_size, is_symmetric=False, op_types_to_quantize=("MatMul",)
    )
    quantizer = MatMulNBitsQuantizer(
        model, nodes_to_exclude=_excluded(model, options), algo_config=config
    )
    quantizer.process()
    return quantizer.model.model


def _to_int8(
    model: onnx.ModelProto, target: Path, options: QuantizationOptions, *, static: bool
) -> Any:
    import onnx
    from onnxruntime import quantization

    if model.ByteSize() >= _LIMIT:
        raise ExportError(
            f"the float32 weights take {model.ByteSize() / 2**30:.1f} GiB, and onnxruntime's int8 "
            "quantizer takes less than 2 GiB.",
            hint="Use precision 'int4' or 'fp16'.",
        )
    shared: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": options.reduce_range,
        "weight_type": quantization.QuantType.QInt8,
        "nodes_to_exclude": _excluded(model, options),
    }
    if not static:
        quantization.quantize_dynamic(model, str(target), **shared)
        return onnx.load(str(target))

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(options.calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            found = next(self._left, None)
            return None if found is None else dict(found)

    quantization.quantize_static(
        model,
        str(target),
        Reader(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        activation_type=quantization.QuantType.QUInt8,
        # Products of two activations (attention) stay in float32.
        extra_options={"MatMulConstBOnly": True},
        **shared,
    )
    return onnx.load(str(target))


def _excluded(model: onnx.ModelProto, options: QuantizationOptions) -> list[str]:
    """Names of the nodes to leave alone; nodes get a name where torch gave them none.

    Those that take the factors of an adapter are among them: what comes in has no bits to spare.
    """
    given = {value.name for value in model.graph.input}
    defaults = {tensor.name for tensor in model.graph.initializer if tensor.name in given}
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    return [
        node.name
        for node in model.graph.node
        if {node.name, node.op_type, *node.input}.intersection({*options.keep, *defaults})
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Onnxruntime's tools log every node, at levels of their own choosing."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
