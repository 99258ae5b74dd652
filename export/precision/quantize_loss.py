"""What fewer bits cost: layer by layer in the weights, and on the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.errors import ConfigError
from gauge_ext.export.report import CaseResult, ValidationReport
from gauge_ext.export.tolerance import Tolerance

if TYPE_CHECKING:
    import onnx

    from gauge_ext.export.precision.quantize_methods import Feeds
    from gauge_ext.export.validate import Focus


@dataclass(frozen=True)
class LayerLoss:
    """One weight in fewer bits.

    Attributes:
        name: The parameter's name.
        shape: As it lies in the graph.
        stored: What its entries are stored as.
        error: ``||W' - W|| / ||W||`` in the Frobenius norm.
        max_abs: ``max|W' - W|``.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    error: float
    max_abs: float


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """The float32 matrices, and tensors of more axes, among a graph's initializers."""
    import onnx

    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and tensor.dims[0]
    }


def layer_losses(
    exact: Mapping[str, NDArray[np.float32]], model: onnx.ModelProto
) -> tuple[tuple[LayerLoss, ...], tuple[str, ...]]:
    """Reads every weight back from a quantized graph and compares it.

    Returns:
        The losses, and the names of weights that stayed in float32.
    """
    import onnx

    found = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = {
        node.input[0]: next((a.i for a in node.attribute if a.name == "axis"), 1)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }

    def array(name: str) -> NDArray[Any]:
        return np.asarray(onnx.numpy_helper.to_array(found[name]))

    losses, kept = [], []
    for name, w in exact.items():
        codes = f"{name}_quantized"
        if f"{name}_Q4" in found:
            zeros = f"{name}_zero_points"
            stored = "int4"
            back = _from_int4(
                array(f"{name}_Q4"), array(f"{name}_scales"), array(zeros), w.shape[0]
            )
        elif codes in found:
            q, scale, zero = array(codes), array(f"{name}_scale"), array(f"{name}_zero_point")
            stored = str(q.dtype)
            back = _from_int8(q, scale, zero, axes.get(codes, q.ndim - 1))
        elif name in found and found[name].data_type == onnx.TensorProto.FLOAT16:
            stored, back = "float16", array(name).astype(np.float64)
        else:
            kept.append(name)
            continue
        # onnxruntime turns the weight of a Gemm over.
        wide = (w.T if back.shape != w.shape else w).astype(np.float64)
        norm = float(np.linalg.norm(wide))
        error = float(np.linalg.norm(back - wide))
        peak = float(np.abs(back - wide).max())
        losses.append(LayerLoss(name, w.shape, stored, error / norm if norm else 0.0, peak))
    return tuple(losses), tuple(kept)


def _from_int8(
    codes: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int
) -> NDArray[np.float64]:
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[axis] = -1
    wide = codes.astype(np.float64) - zero.astype(np.float64).reshape(shape)
    return wide * scale.astype(np.float64).reshape(shape)


def _from_int4(
    packed: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[np.uint8], rows: int
) -> NDArray[np.float64]:
    """MatMulNBits: (out, blocks, bytes), two codes a byte, the lower four bits first."""
    columns, blocks = packed.shape[:2]
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(columns, blocks, -1)
    zero = np.stack((zeros & 15, zeros >> 4), -1).reshape(columns, -1)[:, :blocks]
    step = scales.reshape(columns, blocks, 1).astype(np.float64)
    wide = (codes.astype(np.float64) - zero[..., None]) * step
    return wide.reshape(columns, -1)[:, :rows].T


def output_losses(
    exact: Path,
    quantized: Path,
    cases: Iterable[tuple[str, Mapping[str, int], Feeds]],
    tolerance: Tolerance | None,
    focus: Focus | None = None,
) -> ValidationReport:
    """Runs both graphs on the same inputs and measures the second against the first.

    Args:
        exact: The float32 graph.
        quantized: The other.
        cases: Name, sizes and inputs of each case.
        tolerance: The bar; None: there is none, and only NaN, infinities and other shapes fail.
        focus: See :func:`gauge_ext.export.validate_onnx`.

    Raises:
        ConfigError: the float32 graph refuses an input.
        ExportError: onnxruntime cannot load a graph.
    """
    import torch

    from gauge_ext.export.compare import compare
    from gauge_ext.export.session import open_session

    one, runtime = open_session(exact)
    other, _ = open_session(quantized)
    names = [output.name for output in one.get_outputs()]
    bar = tolerance or Tolerance(relative=1e300, cosine=-1.0, top1=0.0)
    results = []
    for case, sizes, feeds in cases:
        try:
            expected = one.run(names, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions have no other common base
            raise ConfigError(
                f"the float32 graph refuses the inputs {case!r}: {str(error).strip()}",
                hint="Give its inputs by their names, with their shapes and dtypes.",
            ) from error
        try:
            found = other.run(names, dict(feeds))
        # As above. What it says is the result of this case, which fails the report.
        except Exception as error:
            results.append(CaseResult(case, dict(sizes), (), str(error).strip()))
            continue
        outputs = []
        for name, y, z in zip(names, expected, found, strict=True):
            logits = name.rpartition(".")[2].endswith("logits")
            left, right = torch.from_numpy(y), torch.from_numpy(z)
            if focus is not None and left.shape == right.shape:
                given = {key: torch.from_numpy(np.asarray(array)) for key, array in feeds.items()}
                left, right = focus(name, left, given), focus(name, right, given)
            result = compare(name, left, right, bar, logits=logits)
            if tolerance is None and not math.isnan(result.max_abs):
                # Without a bar only what is no number at all fails, and integers that differ.
                odd = result.reason is not None and not result.reason.startswith("max abs")
                result = replace(
                    result,
                    limit=math.inf,
                    passed=not odd,
                    reason=result.reason if odd else None,
                )
            outputs.append(result)
        results.append(CaseResult(case, dict(sizes), tuple(outputs)))
    return ValidationReport(quantized, runtime, tuple(results))
