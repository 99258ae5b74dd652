"""Patched files against sums by numpy on what onnx itself reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_layouts import (
    LAYOUTS,
    arrays_of,
    quantize_by_hand,
    random_weights,
    write_adapter,
    write_model,
    write_quantized,
)

from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError, ValidationError
from gauge_ext.export import patch_onnx
from gauge_ext.export.patching import update as update_module
from gauge_ext.export.patching.patch import PATCHED_KEY

SHAPES = {"enc.a": (12, 8), "enc.b": (20, 12), "enc.c": (20, 20), "enc.d": (6, 20)}


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_all_layouts_and_dtypes(dtype, external, tmp_path, monkeypatch):
    monkeypatch.setattr(update_module, "CHUNK", 5 * 4 * 12)  # blocks of a few rows
    weights = random_weights(SHAPES, dtype)
    base = write_model(tmp_path / "base.onnx", weights, LAYOUTS, external=external)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapted = {module: SHAPES[module] for module in SHAPES if module != "enc.b"}
    updates = write_adapter(tmp_path / "adapter", adapted)
    out = tmp_path / "out.onnx"
    report = patch_onnx(base, tmp_path / "adapter", out, verify=dtype == "f4")
    assert {w.module: w.tensor for w in report.weights} == {
        "enc.a": "enc.a.weight",
        "enc.c": "val_62",
        "enc.d": "onnx::MatMul_63",
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == (
        before
    )
    old, new = arrays_of(base), arrays_of(out)
    for weight in report.weights:
        delta = updates[weight.module]
        if weight.layout == "(in, out)":
            delta = delta.T
        exact = old[weight.tensor].astype("f8") + delta
        got = new[weight.tensor]
        assert got.dtype == np.dtype(dtype)
        # Rounded once to dtype; before, sums were taken in float32, or in float64.
        wide = np.finfo("f8" if dtype == "f8" else "f4").eps
        slack = 2 * wide * (np.abs(old[weight.tensor].astype("f8")) + np.abs(delta))
        assert (np.abs(got - exact) <= 0.5 * np.spacing(np.abs(got)) + slack).all()
        assert not np.array_equal(got, old[weight.tensor])
    assert np.array_equal(old["enc.b.weight"], new["enc.b.weight"])
    onnx.checker.check_model(str(out))
    files = sorted(path.name for path in report.files)
    assert files == (["out.onnx", "out.onnx.data"] if external else ["out.onnx"])
    assert report.bytes_written == sum(path.stat().st_size for path in report.files)
    if dtype == "f4":
        x = np.random.default_rng(1).standard_normal((3, 8)).astype("f4")
        y = x.astype("f8")
        for module, weight in weights.items():
            y = y @ (weight.astype("f8") + updates.get(module, 0.0)).T
        np.testing.assert_allclose(run(out, x), y, rtol=1e-4, atol=1e-3)
        assert report.difference is not None
        assert report.difference < 1e-5


def test_bfloat16_is_rounded_once(tmp_path):
    import ml_dtypes

    weights = random_weights({"a": (12, 8)}, ml_dtypes.bfloat16)
    base = write_model(tmp_path / "base.onnx", weights, ["gemm"])
    updates = write_adapter(tmp_path / "adapter", {"a": (12, 8)})
    patch_onnx(base, tmp_path / "adapter", tmp_path / "out.onnx")
    exact = weights["a"].astype("f8") + updates["a"]
    got = arrays_of(tmp_path / "out.onnx")["a.weight"]
    assert got.dtype == ml_dtypes.bfloat16
    assert np.array_equal(got, exact.astype("f4").astype(ml_dtypes.bfloat16))


def test_scalings_of_every_kind(tmp_path):
    shapes = {"enc.a": (12, 8), "enc.d": (6, 12)}
    base = write_model(tmp_path / "b.onnx", random_weights(shapes), ["gemm", "folded"])
    plain = write_adapter(tmp_path / "adapter", shapes)
    factors = {module: update / 2.0 for module, update in plain.items()}  # s was 6 / 3
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    said |= {"use_rslora": True, "alpha_pattern": {"d": 5}, "fan_in_fan_out": True}
    file.write_text(json.dumps(said))
    patch_onnx(base, {tmp_path / "adapter": -0.5}, tmp_path / "o.onnx")
    old, new = arrays_of(base), arrays_of(tmp_path / "o.onnx")
    root = 3**0.5
    for name, expected in (
        ("enc.a.weight", -0.5 * 6 / root * factors["enc.a"]),
        ("val_61", -0.5 * 5 / root * factors["enc.d"].T),
    ):
        np.testing.assert_allclose(new[name] - old[name], expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up(tmp_path):
    base = write_model(tmp_path / "b.onnx", random_weights(SHAPES), LAYOUTS)
    one = write_adapter(tmp_path / "one", {"enc.a": SHAPES["enc.a"], "enc.b": SHAPES["enc.b"]})
    two = write_adapter(tmp_path / "two", {"enc.a": SHAPES["enc.a"]}, seed=1, r=5, lora_alpha=5)
    report = patch_onnx(
        base, [(tmp_path / "one", 0.5), (tmp_path / "two", 2.0)], tmp_path / "o.onnx", verify=True
    )
    old, new = arrays_of(base), arrays_of(tmp_path / "o.onnx")
    expected = 0.5 * one["enc.a"] + 2.0 * two["enc.a"]
    np.testing.assert_allclose(new["enc.a.weight"] - old["enc.a.weight"], expected, atol=1e-5)
    np.testing.assert_allclose(
        new["enc.b.weight"] - old["enc.b.weight"], 0.5 * one["enc.b"], atol=1e-5
    )
    assert report.weights[0].rank == [3, 5]
    assert report.weights[0].scaling == [1.0, 2.0]


def test_what_was_done_is_in_the_file_and_adds_up(tmp_path):
    shapes = {"enc.a": (12, 8)}
    base = write_model(
        tmp_path / "b.onnx", random_weights(shapes), ["gemm"], metadata={"kept": "yes", "z": "1"}
    )
    update = write_adapter(tmp_path / "adapter", shapes)["enc.a"]
    first = patch_onnx(base, tmp_path / "adapter", tmp_path / "1.onnx")
    patch_onnx(tmp_path / "1.onnx", {tmp_path / "adapter": -1.0}, tmp_path / "2.onnx")
    said = {p.key: p.value for p in onnx.load(str(tmp_path / "2.onnx")).metadata_props}
    assert (said["kept"], said["z"]) == ("yes", "1")
    history = json.loads(said[PATCHED_KEY])
    assert [entry["weights"]["enc.a.weight"]["scaling"] for entry in history] == [2.0, -2.0]
    assert history[0]["adapter_sha256"] == [first.adapter_sha256]
    there, back = arrays_of(tmp_path / "1.onnx"), arrays_of(tmp_path / "2.onnx")
    assert np.abs(update).max() > 0.1
    old = arrays_of(base)["enc.a.weight"]
    np.testing.assert_allclose(back["enc.a.weight"], old, atol=1e-6)
    assert not np.allclose(there["enc.a.weight"], old, atol=0.01)


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("with_zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks(bits, with_zero, external, few_rows, tmp_path):
    few_rows(5, decoded=96, stored=96 * bits // 8 + 3 * 4 + (3 * bits + 7) // 8 * with_zero)
    weight = np.random.default_rng(3).standard_normal((24, 80)).astype("f4")
    base, held = write_quantized(
        tmp_path / "b.onnx", weight, bits=bits, size=32, with_zero=with_zero, external=external
    )
    update = write_adapter(tmp_path / "adapter", {"a": (24, 80)}, lora_alpha=12)["a"]
    report = patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx", verify=True)
    loss = report.weights[0].loss
    x = np.eye(80, dtype="f4")
    got = run(tmp_path / "o.onnx", x).T  # onnxruntime's own decoding
    np.testing.assert_allclose(run(base, x).T, held, atol=1e-5)
    error = np.linalg.norm(got - held - update)
    assert error / np.linalg.norm(update) == pytest.approx(loss.of_update, rel=0.02, abs=1e-4)
    assert error / np.linalg.norm(held + update) == pytest.approx(
        loss.of_weight, rel=0.02, abs=1e-4
    )
    # No worse than quantizing the sum afresh, by a plain loop.
    codes, scales, zeros = quantize_by_hand((held + update).astype("f4"), bits, 32, with_zero)
    fresh = ((codes.astype("f4") - zeros[..., None]) * scales[..., None]).reshape(24, -1)[:, :80]
    assert error <= 1.01 * np.linalg.norm(fresh - held - update)


@pytest.mark.usefixtures("few_rows")
def test_blocks_that_an_update_does_not_touch_stay(tmp_path):
    weight = np.random.default_rng(3).standard_normal((16, 64)).astype("f4")
    base, _ = write_quantized(tmp_path / "b.onnx", weight, bits=4, size=32, with_zero=True)
    write_adapter(tmp_path / "adapter", {"a": (16, 64)})
    report = patch_onnx(base, {tmp_path / "adapter": 0.0}, tmp_path / "o.onnx")
    old, new = arrays_of(base), arrays_of(tmp_path / "o.onnx")
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert report.weights[0].loss.of_weight < 1e-6


def test_blocks_with_numbers_that_are_none_are_refused(few_rows, tmp_path, listing):
    few_rows(3, decoded=64, stored=64 // 2 + 2 * 4 + 1)
    weight = np.random.default_rng(3).standard_normal((16, 64)).astype("f4")
    base, _ = write_quantized(tmp_path / "b.onnx", weight, bits=4, size=32, with_zero=True)
    model = onnx.load(str(base))
    (held,) = (t for t in model.graph.initializer if t.name == "a.weight_scales")
    scales = onnx.numpy_helper.to_array(held).copy()
    scales[13] = np.nan
    held.CopyFrom(onnx.numpy_helper.from_array(scales, held.name))
    onnx.save(model, str(base))
    write_adapter(tmp_path / "adapter", {"a": (16, 64)})
    before = listing()
    with pytest.raises(NonFiniteError, match=r"a\.weight_Q4 or its sum .* Nothing was written"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx")
    assert listing() == before


def test_a_wrong_sum_is_caught(tmp_path, monkeypatch):
    base = write_model(tmp_path / "b.onnx", random_weights(SHAPES), LAYOUTS)
    write_adapter(tmp_path / "adapter", SHAPES)
    right = update_module.product

    def wrong(left, right_, out):
        right(left, right_, out)
        out[0, 0] += 0.05

    monkeypatch.setattr(update_module, "product", wrong)
    with pytest.raises(ValidationError, match=r"differs from the base with W \+ s·B·A by"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx", verify=True)
    assert not (tmp_path / "o.onnx").exists()
    assert not list(tmp_path.glob(".o*"))


def test_nothing_is_written_when_numbers_are_none(tmp_path, listing):
    weights = random_weights(SHAPES)
    weights["enc.c"][3, 4] = np.inf
    base = write_model(tmp_path / "b.onnx", weights, LAYOUTS)
    write_adapter(tmp_path / "adapter", SHAPES)
    before = listing()
    with pytest.raises(NonFiniteError, match="val_62 holds NaN or infinity"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx")
    assert listing() == before


def test_the_base_is_not_a_place_to_write(tmp_path):
    base = write_model(tmp_path / "b.onnx", random_weights(SHAPES), LAYOUTS)
    write_adapter(tmp_path / "adapter", SHAPES)
    with pytest.raises(ConfigError, match="out is the base itself"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "b.onnx")


def test_variants_of_lora_are_refused_by_name(tmp_path):
    base = write_model(tmp_path / "b.onnx", random_weights(SHAPES), LAYOUTS)
    write_adapter(tmp_path / "adapter", SHAPES, modules_to_save=["head"])
    with pytest.raises(ConfigError, match="modules_to_save"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx")


def test_int8_weights_are_refused(tmp_path):
    weights = {"a": np.ones((4, 4), "i1")}
    base = write_model(tmp_path / "b.onnx", weights, ["folded"])
    write_adapter(tmp_path / "adapter", {"a": (4, 4)})
    with pytest.raises(ConfigError, match=r"of type 3.*before it is quantized"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx")


def test_another_model(tmp_path):
    base = write_model(tmp_path / "b.onnx", random_weights(SHAPES), LAYOUTS)
    write_adapter(tmp_path / "adapter", {"dec.q": (3, 3)})
    with pytest.raises(AdapterMismatchError, match=r"1 of the adapter's 1.*'dec\.q' \(3, 3\)"):
        patch_onnx(base, tmp_path / "adapter", tmp_path / "o.onnx")


_MEASURED = """
import sys
import numpy
# Not ru_maxrss, which is inherited.
peak = lambda: next(
    int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")
)
before = peak()
from gauge_ext.export.patching.patch import patch_onnx
patch_onnx(*sys.argv[1:4])
assert not {"torch", "onnxruntime", "safetensors"} & set(sys.modules), sorted(sys.modules)
print(peak() - before)
"""


_IN_NUMPY = """
from gauge_ext import _native
_native.load = lambda: None
"""


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
def test_memory_stays_small(external, tmp_path):
    weights = {f"layers.{i}.q": np.zeros((4096, 3072), "f4") for i in range(5)}
    for weight in list(weights):
        weights[weight] = weights[weight] if external else weights[weight].T.copy().T
    chain = {m: (w if i % 2 else w.T) for i, (m, w) in enumerate(weights.items())}
    base = write_model(tmp_path / "b.onnx", chain, ["gemm", "folded"] * 3, external=external)
    del weights
    shapes = {module: weight.shape for module, weight in chain.items()}
    write_adapter(tmp_path / "adapter", shapes, r=16)
    command = [sys.executable, "-c", _MEASURED, base, tmp_path / "adapter", tmp_path / "o.onnx"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 5 * 4096 * 3072 * 4 > 200 * 2**20
    assert 0 < float(done.stdout) < 64


@pytest.mark.parametrize("path", ["compiled", "numpy"])
def test_blocks_are_never_all_decoded_at_once(path, tmp_path):
    rows = columns = 4096
    codes = np.random.default_rng(0).integers(0, 256, (rows, columns // 32, 32), dtype=np.uint8)
    scales = np.full(codes[..., 0].size, 0.01, "f4")
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "a.weight_Q8", "a.weight_scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=8,
        block_size=32,
    )
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    stored = [
        onnx.numpy_helper.from_array(codes, "a.weight_Q8"),
        onnx.numpy_helper.from_array(scales, "a.weight_scales"),
    ]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], stored)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    base = tmp_path / "b.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(base))
    write_adapter(tmp_path / "adapter", {"a": (rows, columns)})
    measured = _MEASURED if path == "compiled" else _IN_NUMPY + _MEASURED
    command = [sys.executable, "-c", measured, base, tmp_path / "adapter", tmp_path / "o.onnx"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 48  # in float32 the weight alone takes 64
