"""Fewer bits: what is written, what is measured against a plain reading of it, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.errors import ConfigError, NonFiniteError, ValidationError
from gauge_ext.export import (
    AdapterSession,
    QuantizationLossError,
    QuantizationOptions,
    Tolerance,
    export_onnx,
    quantize_onnx,
    read_provenance,
)

WIDTH = 64


class Tokens(nn.Module):
    """An embedding, layers on three axes and on two, a norm, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.up = nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pooled = nn.Linear(WIDTH, 40)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return {"logits": self.head(x), "pooled": self.pooled(x.mean(1))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantize") / "fp32.onnx"
    axes = ({0: "batch", 1: "steps"},)
    ids = torch.randint(50, (3, 7))
    export_onnx(Tokens(), (ids,), path, dynamic_shapes=axes, validate=False)
    return path


def feeds(seed: int, rows: int = 4, columns: int = 9) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, 50, (rows, columns))}


CALIBRATION = QuantizationOptions(calibration=[feeds(seed) for seed in range(4)])


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)


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


class TestRefusals:
    @pytest.mark.parametrize(
        ("precision", "options", "match"),
        [
            ("bf16", {}, "no bfloat16 MatMul"),
            ("int3", {}, "must be one of"),
            ("int8-static", {}, "none are given"),
            ("int4", {"block_size": 33}, "block_size"),
        ],
    )
    def test_options(self, precision, options, match, made, mlp, tmp_path):
        chosen = QuantizationOptions(**options)
        with pytest.raises(ConfigError, match=match):
            quantize_onnx(made, tmp_path / "m.onnx", precision, options=chosen)
        with pytest.raises(ConfigError, match=match):
            export_onnx(
                mlp,
                (torch.randn(2, 12),),
                tmp_path / "m.onnx",
                precision=precision,
                quantization=chosen,
            )
        assert not list(tmp_path.iterdir())

    def test_modes_dtypes_and_options_that_do_not_go_together(self, mlp, tmp_path):
        for model, options, match in (
            (mlp, {"quantization": QuantizationOptions()}, "precision is 'fp32'"),
            (copy.deepcopy(mlp).double(), {"precision": "int8"}, "float64"),
        ):
            x = torch.randn(2, 12, dtype=next(model.parameters()).dtype)
            with pytest.raises(ConfigError, match=match):
                export_onnx(model, (x,), tmp_path / "m.onnx", **options)

    def test_a_weight_beyond_float16(self, mlp, tmp_path):
        mlp.up.weight.data[1, 2] = 1e6
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx", validate=False)
        with pytest.raises(NonFiniteError, match=r"up\.weight.*keep="):
            quantize_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
        options = QuantizationOptions(keep=["up.weight"])
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16", options=options)

    def test_files_and_inputs(self, made, tmp_path):
        out = tmp_path / "m.onnx"
        with pytest.raises(ConfigError, match="no file"):
            quantize_onnx(tmp_path / "none.onnx", out, "int8")
        (tmp_path / "bad.onnx").write_bytes(b"bad")
        with pytest.raises(ConfigError, match=r"bad\.onnx is not a whole ONNX file"):
            quantize_onnx(tmp_path / "bad.onnx", out, "int8")
        beside = tmp_path / "beside.onnx"
        onnx.save(onnx.load(made), beside, save_as_external_data=True, location="weights")
        for spoil, why in (
            (lambda file: file.write_bytes(b"short"), "exceeds available data"),
            (Path.unlink, "is not regular file|doesn't exist"),
        ):
            spoil(tmp_path / "weights")
            with pytest.raises(ConfigError, match=rf"beside\.onnx is not a whole.*({why})"):
                quantize_onnx(beside, out, "int8")
        assert not out.exists()
        with pytest.raises(ConfigError, match="refuses the inputs 'input 1'"):
            quantize_onnx(made, out, "int8", inputs=[{"x": np.zeros(3)}])
        quantize_onnx(made, out, "int8")
        with pytest.raises(ConfigError, match="in int8 already"):
            quantize_onnx(out, tmp_path / "again.onnx", "int4")
