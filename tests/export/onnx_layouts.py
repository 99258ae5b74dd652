"""Small ONNX files with a linear layer in every layout that exporters make, and their adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

LAYOUTS = ("gemm", "transpose", "folded", "legacy")
FOLDED = "pkg.onnxscript.optimizer.folded_from"
SCOPES = "pkg.torch.onnx.name_scopes"


def write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0, **fields: Any
) -> dict[str, np.ndarray]:
    """Writes PEFT's files; returns s·B·A of each module, in float64."""
    rng = np.random.default_rng(seed)
    rank, alpha = fields.get("r", 3), fields.get("lora_alpha", 6)
    tensors, updates = {}, {}
    for module, (rows, columns) in shapes.items():
        a = rng.standard_normal((rank, columns)).astype("f4")
        b = (0.1 * rng.standard_normal((rows, rank))).astype("f4")
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        updates[module] = alpha / rank * (b.astype("f8") @ a.astype("f8"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps({**said, **fields}))
    return updates


def linear_nodes(
    module: str, x: str, y: str, weight: np.ndarray, layout: str, number: int
) -> tuple[list[onnx.NodeProto], onnx.TensorProto, list[onnx.ValueInfoProto]]:
    """The nodes, the initializer and the notes of a linear layer; ``weight`` is (out, in)."""
    scopes = str(["", module, f"linear_{number}"])
    if layout in {"gemm", "transpose"}:
        stored = numpy_helper.from_array(np.ascontiguousarray(weight), f"{module}.weight")
        if layout == "gemm":
            return [helper.make_node("Gemm", [x, stored.name], [y], transB=1)], stored, []
        turned = f"val_{number}_t"
        nodes = [
            helper.make_node("Transpose", [stored.name], [turned], perm=[1, 0]),
            helper.make_node("MatMul", [x, turned], [y], name=f"node_{number}"),
        ]
        return nodes, stored, []
    name = f"val_{number}" if layout == "folded" else f"onnx::MatMul_{number}"
    stored = numpy_helper.from_array(np.ascontiguousarray(weight.T), name)
    node = helper.make_node("MatMul", [x, name], [y], name=f"node_linear_{number}")
    if layout == "legacy":
        node.name = f"/{module.replace('.', '/', 1)}/MatMul"
        return [node], stored, []
    note = helper.make_tensor_value_info(name, stored.data_type, stored.dims)
    note.metadata_props.add(key=FOLDED, value=str([f"{module}.weight"]))
    node.metadata_props.add(key=SCOPES, value=scopes)
    return [node], stored, [note]


def write_model(
    path: Path,
    weights: Mapping[str, np.ndarray],
    layouts: Sequence[str],
    *,
    external: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A chain of linear layers, ``(out, in)`` each, in the layouts given."""
    nodes, stored, notes = [], [], []
    x = "x"
    for number, (module, weight) in enumerate(weights.items()):
        made = linear_nodes(module, x, f"h{number}", weight, layouts[number], number + 60)
        nodes += made[0]
        stored.append(made[1])
        notes += made[2]
        x = f"h{number}"
    ends = list(weights.values())
    first, last = ends[0], ends[-1]
    kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", first.shape[1]])],
        [helper.make_tensor_value_info(x, kind, ["batch", last.shape[0]])],
        stored,
        value_info=notes,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, dict(metadata or {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        str(path),
        save_as_external_data=external,
        location=f"{path.name}.data",
        size_threshold=0,
    )
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The initializers of a file, read by onnx itself."""
    graph = onnx.load(str(path)).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def random_weights(shapes: Mapping[str, tuple[int, int]], dtype: str = "f4") -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {m: rng.standard_normal(shape).astype(dtype) for m, shape in shapes.items()}


def quantize_by_hand(weight: np.ndarray, bits: int, size: int, with_zero: bool) -> tuple[Any, ...]:
    """Codes, scales and zero points of ``(N, K)``, by a plain loop over blocks."""
    rows, columns = weight.shape
    count, top = -(-columns // size), 2**bits - 1
    codes = np.zeros((rows, count, size), "u1")
    scales = np.zeros((rows, count), "f4")
    zeros = np.full((rows, count), 2 ** (bits - 1), "u1")
    for row in range(rows):
        for block in range(count):
            values = weight[row, block * size : (block + 1) * size]
            if with_zero:
                low, high = min(values.min(), 0.0), max(values.max(), 0.0)
                scale = (high - low) / top
                zeros[row, block] = round(-low / scale)
            else:
                scale = np.abs(values).max() / (2 ** (bits - 1) - 1)
            scales[row, block] = scale
            code = np.rint(values / scales[row, block]) + zeros[row, block]
            codes[row, block, : len(values)] = np.clip(code, 0, top)
            codes[row, block, len(values) :] = zeros[row, block]
    return codes, scales, zeros


def pack_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as bytes, two to a byte with the first one low."""
    if bits == 8:
        return codes
    packed = []
    for row in codes:
        padded = [*row, *([0] if len(row) % 2 else [])]
        packed.append([padded[i] | padded[i + 1] << 4 for i in range(0, len(padded), 2)])
    return np.array(packed, "u1")


def write_quantized(
    path: Path, weight: np.ndarray, *, bits: int, size: int, with_zero: bool, external: bool = False
) -> tuple[Path, np.ndarray]:
    """A ``MatMulNBits`` of ``(N, K)``; returns the file and the weight that it holds."""
    rows, columns = weight.shape
    codes, scales, zeros = quantize_by_hand(weight, bits, size, with_zero)
    held = (codes.astype("f4") - zeros[..., None]) * scales[..., None]
    held = held.reshape(rows, -1)[:, :columns]
    packed = pack_by_hand(codes.reshape(rows, -1), bits).reshape(rows, codes.shape[1], -1)
    stored = [
        numpy_helper.from_array(packed, "a.weight_Q4"),
        numpy_helper.from_array(scales.reshape(-1), "a.weight_scales"),
    ]
    inputs = ["x", "a.weight_Q4", "a.weight_scales"]
    if with_zero:
        stored.append(numpy_helper.from_array(pack_by_hand(zeros, bits).reshape(-1), "zp"))
        inputs.append("zp")
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=size,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        stored,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(
        model,
        str(path),
        save_as_external_data=external,
        location=f"{path.name}.data",
        size_threshold=0,
    )
    return path, held
