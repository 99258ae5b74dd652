"""Fewer bits: what is written, and what is measured against a plain reading of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from quantized_tokens import CALIBRATION, WIDTH, feeds, run
from torch import nn

from gauge_ext.errors import ValidationError
from gauge_ext.export import (
    QuantizationLossError,
    QuantizationOptions,
    Tolerance,
    export_onnx,
    quantize_onnx,
)


@pytest.mark.parametrize(
    ("precision", "smaller", "cosine", "error"),
    [("fp16", 0.7, 0.99999, 1e-3), ("int8", 0.6, 0.99, 2e-2), ("int4", 0.9, 0.97, 0.2)],
)
def test_the_report_says_what_is_in_the_file(precision, smaller, cosine, error, made, tmp_path):
    path = tmp_path / "m.onnx"
    inputs = [feeds(10), feeds(11, 1, 1)]
    report = quantize_onnx(made, path, precision, inputs=inputs)
    assert report.bytes_before == made.stat().st_size
    assert report.bytes_after == path.stat().st_size < smaller * report.bytes_before
    assert 0 < report.weight_error < error
    names = {layer.name for layer in report.layers}
    assert {"up.weight", "down.weight", "pooled.weight"} <= names
    # The outputs, measured here with nothing of the package.
    worst = 0.0
    for number, case in enumerate(inputs):
        for name, y, z in zip(("logits", "pooled"), run(made, case), run(path, case), strict=True):
            found = next(o for o in report.cases[number].outputs if o.name == name)
            assert found.max_abs == pytest.approx(float(np.abs(y - z).max()), rel=1e-6)
            alike = float((y * z).sum() / np.linalg.norm(y) / np.linalg.norm(z))
            assert found.cosine == pytest.approx(alike, abs=1e-6)
            assert alike > cosine
            worst = max(worst, found.max_abs)
    assert report.max_abs == worst > 0
    assert report.passed
    said = json.loads(report.to_json())
    assert said["tolerance"] is None
    assert said["cases"][0]["outputs"][0]["limit"] is None
    kept = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert kept["gauge_ext.precision"] == precision
    before = {p.key: p.value for p in onnx.load(made).metadata_props}
    assert before.items() <= kept.items()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weight_errors_by_an_identity(precision, tmp_path):
    """A layer fed with the unit matrix gives its weight, as stored, as its output."""
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(WIDTH, 48, bias=False))
    exact, path = tmp_path / "fp32.onnx", tmp_path / "m.onnx"
    unit = np.eye(WIDTH, dtype=np.float32)[None]
    axes = ({0: "batch", 1: "rows"},)
    export_onnx(layer, (torch.from_numpy(unit),), exact, dynamic_shapes=axes, validate=False)
    report = quantize_onnx(exact, path, precision)
    (loss,) = report.layers
    stored = run(path, {"input": unit})[0][0]
    w = layer[0].weight.detach().numpy().T
    error = np.linalg.norm(stored - w) / np.linalg.norm(w)
    # 0 and 1 are exact in uint8, so the product is the stored weight.
    assert loss.error == pytest.approx(error, rel=1e-3)
    assert loss.max_abs == pytest.approx(float(np.abs(stored - w).max()), rel=1e-3)
    assert loss.name == "0.weight"


def test_static_ranges_come_from_the_calibration(made, tmp_path):
    report = quantize_onnx(
        made, tmp_path / "a.onnx", "int8-static", inputs=[feeds(20)], options=CALIBRATION
    )
    assert report.cosine > 0.99
    errors = {layer.name: layer.error for layer in report.layers}
    assert set(errors) >= {"up.weight", "down.weight", "pooled.weight"}
    assert 0 < max(errors.values()) < 2e-2
    kinds = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "DynamicQuantizeLinear" not in kinds


def test_what_must_stay_in_float32_stays(made, tmp_path):
    path = tmp_path / "m.onnx"
    quantize_onnx(made, path, "fp16", options=QuantizationOptions(keep=["up.weight"]))
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    assert types[norm.input[0]] == onnx.TensorProto.FLOAT
    assert types["up.weight"] == onnx.TensorProto.FLOAT
    assert types["down.weight"] == onnx.TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT16
    report = quantize_onnx(made, path, "int4", options=QuantizationOptions(keep=["up.weight"]))
    assert "up.weight" in report.kept
    assert "down.weight" not in report.kept


def test_seven_bits_for_weights_unless_all_eight_are_asked_for(made, tmp_path):
    peaks = {}
    for reduce_range in (True, False):
        path = tmp_path / "m.onnx"
        quantize_onnx(made, path, "int8", options=QuantizationOptions(reduce_range=reduce_range))
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        codes = weights["up.weight_quantized"]
        assert codes.dtype == np.int8
        peaks[reduce_range] = int(np.abs(codes.astype(int)).max())
    assert peaks == {True: 64, False: 127}


def test_smaller_blocks_lose_less(made, tmp_path):
    errors = [
        quantize_onnx(
            made, tmp_path / "m.onnx", "int4", options=QuantizationOptions(block_size=size)
        ).weight_error
        for size in (16, 32, 64)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[-1]


def test_a_bar_is_what_the_user_sets(made, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    strict = QuantizationOptions(tolerance=Tolerance(relative=1e-6))
    with pytest.raises(QuantizationLossError, match="int4 loses more than allowed") as caught:
        quantize_onnx(made, path, "int4", inputs=[feeds(1)], options=strict)
    assert isinstance(caught.value, ValidationError)
    assert caught.value.report.max_abs > 0
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    loose = QuantizationOptions(tolerance=Tolerance(relative=1.0, cosine=0.9, top1=0.0))
    report = quantize_onnx(made, path, "int4", inputs=[feeds(1)], options=loose)
    assert report.tolerance == loose.tolerance
