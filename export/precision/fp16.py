"""Weights and most of the arithmetic in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gauge_ext.errors import NonFiniteError
from gauge_ext.export.precision.adapter_nodes import closed

if TYPE_CHECKING:
    import onnx

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


def to_fp16(model: onnx.ModelProto, excluded: set[str], keep: Sequence[str]) -> Any:
    """A model in float16 but for what would leave its range; inputs and outputs stay float32.

    Args:
        model: In float32; used up.
        excluded: Names of nodes that stay in float32.
        keep: Names or kinds of nodes that stay in float32.

    Raises:
        NonFiniteError: a weight exceeds float16.
    """
    import onnx
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

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
    kept = [kind for kind in (*KEPT_IN_FLOAT32, *keep) if kind in kinds]
    with closed(model) as reopen:
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kept],
            node_block_list=sorted(excluded),
        )
        reopen(half)
    del half.graph.value_info[:]  # some say float32 of what is float16 now
    return half
