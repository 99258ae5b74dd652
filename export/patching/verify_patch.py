"""A patched file against its base in onnxruntime, with the sums made another way.

The base's graph takes each changed weight as an input, and is fed ``W + s·B·A``: the whole product
in float64, added to the weight as onnx's own reader gives it, rounded once. Nothing of the way in
which the patch was made has a part in that. Block-quantized weights are decoded from the patched
file and fed to a plain ``MatMul``: what remains is how onnxruntime reads the blocks; that they hold
``W + s·B·A`` but for the rounding is seen by comparing the two matrices.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gauge_ext.errors import ExportError, ValidationError
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.numbers import Array
from gauge_ext.export.disk.onnx_file import FLOAT, FLOAT16, OnnxFile, open_onnx
from gauge_ext.export.disk.spans import opened
from gauge_ext.export.patching.feeds import random_feeds
from gauge_ext.export.patching.homes import Home
from gauge_ext.export.patching.nbits import quantized_weight, read_rows
from gauge_ext.export.patching.updates import Updates

if TYPE_CHECKING:
    import onnx

# Largest difference over the largest output. Blocks may be multiplied in 8 bits (accuracy_level).
_FLOAT_TOLERANCE, _HALF_TOLERANCE, _BLOCK_TOLERANCE = 1e-4, 2e-2, 3e-2
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def verify_patch(
    file: OnnxFile, patched: Path, homes: tuple[Home, ...], updates: Updates, *, cases: int = 2
) -> float:
    """Runs both on random inputs.

    Args:
        file: The base.
        patched: The patched file.
        homes: The weights that changed.
        updates: What was added.
        cases: How many sets of inputs.

    Returns:
        The largest difference of an output, over the largest value of that output.

    Raises:
        ValidationError: they differ by more than rounding, or an output is not finite.
        ExportError: onnxruntime cannot run one of them, or is not installed.
    """
    require_packages("onnx", "onnxruntime")
    import onnx

    model = onnx.load(str(file.path), load_external_data=False)
    changed = open_onnx(patched)
    weights = {}
    tolerance = _FLOAT_TOLERANCE
    for home in homes:
        if home.site.blocks is None:
            name, value = home.site.tensor, _sum_by_hand(file, home, updates)
            _make_input(model, name, value)
        else:
            name, value = _unquantize(model, file, changed, home, updates)
            tolerance = max(tolerance, _BLOCK_TOLERANCE)
        if value.dtype == np.float16:
            tolerance = max(tolerance, _HALF_TOLERANCE)
        weights[name] = value
    ours = _session(str(patched), None)
    theirs = _session(model.SerializeToString(), file.path.parent)
    worst = 0.0
    for seed in range(cases):
        feeds = random_feeds(model.graph, skip=weights, seed=seed)
        names = [output.name for output in ours.get_outputs()]
        for name, got, wanted in zip(
            names, _run(ours, names, feeds), _run(theirs, names, feeds | weights), strict=True
        ):
            worst = max(worst, _difference(name, got, wanted, tolerance))
    return worst


def _difference(name: str, got: Array, wanted: Array, tolerance: float) -> float:
    if got.shape != wanted.shape:
        raise ValidationError(f"output {name!r} has the shape {got.shape}, not {wanted.shape}.")
    if got.dtype.kind != "f" or not got.size:
        return 0.0
    largest = float(np.abs(wanted).max()) or 1.0
    found = float(np.abs(got.astype("<f8") - wanted).max()) / largest
    if not found <= tolerance:  # NaN is no agreement
        raise ValidationError(
            f"output {name!r} of the patched model differs from the base with W + s·B·A by "
            f"{found:.1e} of its largest value; up to {tolerance:.0e} is rounding.",
            hint="Nothing was written.",
        )
    return found


def _change(weight: Array, home: Home, updates: Updates) -> Array:
    """``W + Σ weight · s · B A``, ``(out, in)`` in float64, as a whole; DoRA scales its rows."""
    total, magnitude = weight.astype("<f8"), None
    for adapter in updates.adapters:
        if home.module in adapter.modules:
            tensors = adapter.read(home.module)
            scaling = adapter.weight * adapter.config.scaling_for(home.module)
            lora_A, lora_B = (tensors[name].astype("<f8") for name in ("lora_A", "lora_B"))
            rank = len(lora_A)
            total += scaling * (lora_B.reshape(-1, rank) @ lora_A.reshape(rank, -1))
            magnitude = tensors.get("lora_magnitude")
    if magnitude is not None:
        lengths = np.linalg.norm(total, axis=1)
        total *= (magnitude.reshape(-1) / np.where(lengths == 0, 1.0, lengths))[:, None]
    return total


def _sum_by_hand(file: OnnxFile, home: Home, updates: Updates) -> Array:
    from onnx import numpy_helper

    whole = type(file.initializers[home.site.tensor].proto)()
    whole.CopyFrom(file.initializers[home.site.tensor].proto)
    if not file.initializers[home.site.tensor].external:
        span = file.initializers[home.site.tensor].span
        assert span is not None
        with span.path.open("rb") as stream:
            stream.seek(span.offset)
            for field in ("raw_data", "float_data", "double_data"):
                whole.ClearField(field)
            whole.raw_data = stream.read(span.length)
    weight: Array = numpy_helper.to_array(whole, base_dir=str(file.path.parent))
    flat = weight.reshape(len(weight), -1)
    turned = home.site.transposed
    total = _change(flat.T if turned else flat, home, updates)
    changed: Array = (total.T if turned else total).reshape(weight.shape).astype(weight.dtype)
    return np.ascontiguousarray(changed)


def _make_input(model: onnx.ModelProto, name: str, value: Array) -> None:
    """Lets the graph take a value from outside."""
    from onnx import helper

    graph = model.graph
    kept = [tensor for tensor in graph.initializer if tensor.name != name]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    if name not in {value.name for value in graph.input}:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))


def _unquantize(
    model: onnx.ModelProto, file: OnnxFile, changed: OnnxFile, home: Home, updates: Updates
) -> tuple[str, Array]:
    """Puts a plain MatMul in place of the blocks, and returns its weight ``(in, out)``."""
    from onnx import helper

    before, after = _decoded(file, home), _decoded(changed, home)
    wanted = _change(before, home, updates)
    lost = float(np.linalg.norm(after - wanted) / (np.linalg.norm(wanted) or 1.0))
    bits = home.site.blocks.bits if home.site.blocks is not None else 8
    # A block's values are at most half a step of range / (2^bits - 1) from their codes.
    if not lost <= 2.0 / (2**bits - 1):
        raise ValidationError(
            f"{home.site.tensor!r} in the patched model is {lost:.1e} away from W + s·B·A, more "
            f"than rounding to {bits} bits.",
            hint="Nothing was written.",
        )
    name = f"{home.site.tensor}_decoded"
    half = file.initializers[home.site.blocks.scales].data_type if home.site.blocks else FLOAT
    value = after.T.astype("<f2" if half == FLOAT16 else "<f4")
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.input[1] == home.site.tensor:
            bias = node.input[5] if len(node.input) > 5 else ""
            inputs, outputs = [node.input[0], name], list(node.output)
            node.Clear()
            product = outputs[0] + "_product" if bias else outputs[0]
            node.CopyFrom(helper.make_node("MatMul", inputs, [product]))
            if bias:
                _insert_after(model, node, helper.make_node("Add", [product, bias], outputs))
    _make_input(model, name, value)
    return name, value


def _insert_after(model: onnx.ModelProto, node: onnx.NodeProto, new: onnx.NodeProto) -> None:
    nodes = list(model.graph.node)
    index = next(i for i, other in enumerate(nodes) if other is node or other == node)
    model.graph.node.insert(index + 1, new)


def _decoded(file: OnnxFile, home: Home) -> Array:
    weight = quantized_weight(file, home.site)
    with ExitStack() as stack:
        spans = [part.span for part in weight.parts if part.span is not None]
        handles = [stack.enter_context(opened(span.path)) for span in spans]
        return weight.values(read_rows(weight, handles, 0, weight.blocks.rows)).astype("<f8")


def _session(model: str | bytes, folder: Path | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.add_session_config_entry(_FOLDER_KEY, str(folder))
    try:
        return onnxruntime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own classes have no common base but this
        what = "the patched model" if folder is None else "the base"
        raise ExportError(f"onnxruntime cannot load {what}: {error}") from error


def _run(session: Any, names: list[str], feeds: dict[str, Array]) -> list[Array]:
    try:
        found: list[Array] = session.run(names, feeds)
    except Exception as error:  # as in _session; ours, raised from it, keeps the cause
        raise ExportError(
            f"onnxruntime cannot run the model on made-up inputs: {error}",
            hint="Leave verify out, and check with inputs of your own.",
        ) from error
    return found
