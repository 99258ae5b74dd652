"""``gauge-ext patch``: the file is W + s B A, every weight is named, and torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]
Delta = Callable[[tuple[Tensor, Tensor]], Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chain of the layers that the adapter ``tiny`` is for."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype("f4") for shape in ((10, 6), (4, 10))]
    names = ["first.weight", "second.weight"]
    nodes = [
        helper.make_node("Gemm", ["x", names[0]], ["h"], transB=1),
        helper.make_node("Gemm", ["h", names[1]], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 6])],
        [helper.make_tensor_value_info("y", 1, ["batch", 4])],
        [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 20)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def weights_of(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(str(path)).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_the_sum_and_the_report(
    model: Path, make_adapter: MakeAdapter, delta: Delta, run: Run, tmp_path: Path
) -> None:
    adapter, factors = make_adapter("tiny")
    out = tmp_path / "out.onnx"
    result = run("patch", model, "--adapter", f"{adapter}=0.5", "--out", out, "--verify", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [weight["tensor"] for weight in report["weights"]] == ["first.weight", "second.weight"]
    assert report["difference"] < 1e-5
    before, after = weights_of(model), weights_of(out)
    for module, pair in factors.items():
        expected = before[f"{module}.weight"] + 0.5 * delta(pair).numpy()
        np.testing.assert_allclose(after[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_what_is_printed(model: Path, make_adapter: MakeAdapter, run: Run, tmp_path: Path) -> None:
    adapter, _ = make_adapter("tiny")
    result = run("patch", model, "--adapter", adapter, "--out", tmp_path / "o.onnx")
    assert result.exit_code == 0, result.output
    for part in ("first.weight", "(out, in)", "the initializer's name", "2 weights patched"):
        assert part in result.stdout


def test_errors_name_what_has_to_change(
    model: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    adapter, _ = make_adapter("bert")
    out = tmp_path / "o.onnx"
    said = fails("--adapter", "patch", model, "--adapter", adapter, "--out", out)
    assert "6 of the adapter's 6 modules" in said
    assert "no such" not in fails(
        "MODEL", "patch", tmp_path / "none.onnx", "--adapter", adapter, "--out", out
    )
    fails("--adapter", "patch", model, "--adapter", tmp_path / "none", "--out", out)
    fails("--out", "patch", model, "--adapter", adapter, "--out", tmp_path)
    assert not out.exists()


def test_it_runs_where_there_is_no_torch(
    model: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, _ = make_adapter("tiny")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'safetensors', 'onnxruntime']))\n"
        "from gauge_ext.cli import main\nmain()"
    )
    out = tmp_path / "o.onnx"
    command = [sys.executable, "-c", code, "patch", model, "--adapter", adapter, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 weights patched" in done.stdout
