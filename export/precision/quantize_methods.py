"""The four ways to store weights in fewer bits, each by onnxruntime's own tools.

They work on graphs whose weights are constants of MatMul; :mod:`linear_form` brings ours there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from numpy.typing import NDArray

from gauge_ext.errors import ConfigError, ExportError, NonFiniteError
from gauge_ext.export.precision.adapter_nodes import adapter_nodes
from gauge_ext.export.precision.fp16 import to_fp16
from gauge_ext.export.precision.linear_form import fold_transposes, unfold_gemms
from gauge_ext.export.tolerance import Tolerance

if TYPE_CHECKING:
    import onnx

Precision = Literal["fp32", "fp16", "int8", "int8-static", "int4"]
Feeds = Mapping[str, NDArray[Any]]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_LIMIT = 2**31 - 2**20  # onnxruntime's int8 quantizer serializes the model, and protobuf ends there


@dataclass(frozen=True)
class QuantizationOptions:
    """How to store weights in fewer bits.

    Attributes:
        calibration: For int8-static: sets of inputs by name, whose activations give the ranges.
            For a model that generates they are prompts, ``input_ids (batch, length)`` and where
            rows are padded ``attention_mask``, which the float32 graphs read and write on after, up
            to 16 tokens each; for an encoder-decoder model those of its encoder (of speech
            ``input_features``), and ``decoder_input_ids`` where its outputs begin otherwise.
        block_size: For int4: how many weights share a scale, 16, 32, 64, 128 or 256.
        keep: Names of nodes, weights or kinds of nodes that stay in float32.
        reduce_range: For int8: weights of 7 bits. With 8, x86 CPUs without VNNI saturate where
            they sum two products in 16 bits, and outputs are wrong by several times the rounding.
        tolerance: How far outputs may be from those of float32. None: there is no bar, and the
            report says how far they are; NaN and infinity fail in any case.
    """

    calibration: Iterable[Feeds] = ()
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
                return to_fp16(model, set(_excluded(model, options)), options.keep)
            if precision == "int4":
                return _to_int4(model, options)
            return _to_int8(model, target, options, static=precision == "int8-static")
    except (NonFiniteError, ConfigError, ExportError, OSError):
        raise
    except Exception as error:  # its tools raise KeyError, AssertionError, ..., kept as the cause
        raise ExportError(
            f"onnxruntime's tools cannot bring this graph to {precision}: "
            f"{type(error).__name__}: {error}"
        ) from error


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

    # onnxruntime comes without types.
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
    """Names of the nodes to leave alone; nodes get a name where torch gave them none."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    factors = adapter_nodes(model)
    return [
        node.name
        for node in model.graph.node
        if node.name in factors or {node.name, node.op_type, *node.input}.intersection(options.keep)
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
