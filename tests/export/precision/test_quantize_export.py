"""Exports in fewer bits: after a merge, with adapters as inputs, and what their files say."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized_tokens import CALIBRATION, WIDTH, Tokens, feeds, run

import gauge_ext
from gauge_ext.export import AdapterSession, export_onnx, quantize_onnx, read_provenance


def test_after_the_merge(adapted, tmp_path):
    torch.manual_seed(2)
    model = Tokens()
    exact = copy.deepcopy(model)
    adapted(model, target_modules=["up", "down"])
    for name in ("up", "down"):
        layer = getattr(model, name)
        update = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
        getattr(exact, name).weight.data += update
    path = tmp_path / "m.onnx"
    report = export_onnx(
        model,
        (torch.randint(50, (3, 7)),),
        path,
        dynamic_shapes=({0: "batch", 1: "steps"},),
        precision="int8",
    )
    assert report.validation.passed  # of the float32 graph, at float32's tolerance
    assert report.validation.max_abs < 1e-4
    lost = report.quantization
    assert [case.name for case in lost.cases][:3] == ["example", "smallest", "larger"]
    assert report.provenance["precision"] == "int8"
    assert report.files == (path,)
    assert report.bytes_written == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert json.loads(report.to_json())["quantization"]["precision"] == "int8"
    case = feeds(5)
    expected = exact(torch.from_numpy(case["ids"]))["pooled"].detach().numpy()
    found = run(path, case)[1]
    assert 1e-6 < np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


def test_a_file_says_what_running_it_found(adapted, tmp_path):
    """And not what running the float32 graph found, which it was made from."""
    model = adapted(Tokens(), target_modules=["up"])
    path = tmp_path / "m.onnx"
    axes = ({0: "batch", 1: "steps"},)
    report = export_onnx(
        model, (torch.randint(50, (3, 7)),), path, dynamic_shapes=axes, precision="int8"
    )
    said = read_provenance(path).graphs["m.onnx"]
    assert said == report.provenance
    summary = json.loads(said["validation"])
    assert summary["against"] == "float32"
    assert summary["cases"] == len(report.quantization.cases)
    assert float(summary["max_abs"]) == pytest.approx(report.quantization.max_abs, rel=0.5)
    assert float(summary["max_abs"]) > 10 * report.validation.max_abs


def test_what_a_float32_file_says_is_not_carried_over(tmp_path):
    """Without inputs nothing is known of the file in fewer bits; with them, what they gave."""
    exact, path = tmp_path / "fp32.onnx", tmp_path / "m.onnx"
    axes = ({0: "batch", 1: "steps"},)
    export_onnx(Tokens(), (torch.randint(50, (3, 7)),), exact, dynamic_shapes=axes)
    before = read_provenance(exact).graphs["fp32.onnx"]
    assert json.loads(before.pop("validation"))["against"] == "torch"
    report = quantize_onnx(exact, path, "int8")
    assert read_provenance(path).graphs["m.onnx"] == before | {"precision": "int8"}
    assert report.bytes_after == path.stat().st_size
    report = quantize_onnx(exact, path, "int8", inputs=[feeds(1), feeds(2)])
    assert report.bytes_after == path.stat().st_size
    said = read_provenance(path).graphs["m.onnx"]
    worst = max(
        float(np.abs(y - z).max())
        for case in (feeds(1), feeds(2))
        for y, z in zip(run(exact, case), run(path, case), strict=True)
    )
    assert json.loads(said.pop("validation")) == {
        "runtime": f"onnxruntime {onnxruntime.__version__} (CPU)",
        "cases": 2,
        "max_abs": f"{worst:.0e}",
        "against": "float32",
    }
    assert said == before | {"precision": "int8"}


@pytest.mark.parametrize(
    ("precision", "form", "factors"),
    [
        ("int8", "optional", "float32"),
        ("int4", "required", "float32"),
        ("fp16", "optional", "float32"),
        ("fp16", "required", "int8"),
        ("fp16", "optional", "float16"),
        ("int8-static", "optional", "float32"),
        ("int8-static", "required", "float16"),
    ],
)
def test_a_quantized_base_with_adapter_inputs(precision, form, factors, adapted, tmp_path):
    model = adapted(Tokens(), target_modules=["up", "pooled"])
    path = tmp_path / "m.onnx"
    report = export_onnx(
        model,
        (torch.randint(50, (3, 7)),),
        path,
        dynamic_shapes=({0: "batch", 1: "steps"},),
        mode="adapters",
        adapter_form=form,
        adapter_precision=factors,
        precision=precision,
        quantization=CALIBRATION if precision == "int8-static" else None,
        random_cases=0,
    )
    assert "up.weight" in {layer.name for layer in report.quantization.layers}
    # The loss is measured without an adapter and with it.
    names = [case.name for case in report.quantization.cases]
    assert {"example", "example, with adapter"} <= set(names)
    assert report.quantization.passed
    stored = onnx.load(path)
    inputs = {value.name: value.type.tensor_type.elem_type for value in stored.graph.input}
    assert inputs["up.lora_A"] == getattr(
        onnx.TensorProto, {"float32": "FLOAT"}.get(factors, factors.upper())
    )
    defaults = {t.name: list(t.dims) for t in stored.graph.initializer if t.name in inputs}
    assert (form == "optional") == ("up.lora_A" in defaults)
    if form == "optional":
        assert defaults["up.lora_A"] == [WIDTH, 0]

    session = AdapterSession(path)
    arrays = {}
    for name in ("up", "pooled"):
        layer = getattr(model, name)
        a = layer.lora_A.detach().numpy().T
        b = layer.scaling * layer.lora_B.detach().numpy().T
        for key, matrix, axis in ((f"{name}.lora_A", a, 0), (f"{name}.lora_B", b, 1)):
            if factors == "int8":
                scale = np.abs(matrix).max(axis=axis) / 127
                arrays[f"{key}.scale"] = scale.astype(np.float32)
                matrix = np.rint(matrix / np.expand_dims(scale, axis))
            arrays[key] = np.ascontiguousarray(matrix.astype(factors))
    session.add("a", arrays)
    case = feeds(6)
    with torch.no_grad():
        expected = model(torch.from_numpy(case["ids"]))["pooled"].numpy()
        plain = gauge_ext.detach(copy.deepcopy(model))(torch.from_numpy(case["ids"]))["pooled"]
    base, found = session.run(case)["pooled"], session.run(case, "a")["pooled"]
    update = np.abs(plain.numpy() - expected).max()
    assert update > 0.5
    bar = 0.02 if precision == "fp16" else 0.3
    assert np.abs(base - plain.numpy()).max() < bar * update
    assert np.abs(found - expected).max() < bar * update
