"""``gauge-ext export --mode adapters`` and ``gauge-ext onnx-adapter``, by their files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]


@pytest.fixture
def graph(factory_folder: Path, run: Run, tmp_path: Path) -> Path:
    """The tiny model with inputs for adapters on both layers."""
    path = tmp_path / "graph.onnx"
    options = ("--mode", "adapters", "--targets", "all-linear", "--random-cases", "0")
    result = run("export", "tiny_models:with_shapes", "--out", path, *options)
    assert result.exit_code == 0, result.output
    return path


def test_the_whole_way(
    graph: Path,
    make_adapter: MakeAdapter,
    delta: Callable[[tuple[Tensor, Tensor]], Tensor],
    run: Run,
    tmp_path: Path,
) -> None:
    folder, factors = make_adapter("tiny")
    out = tmp_path / "a.onnx_adapter"
    result = run("onnx-adapter", graph, "--adapter", folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 layers of rank 3 in float32" in result.stdout

    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    torch.manual_seed(7)
    first, second = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)
    hidden = torch.tanh(x @ (first.weight + delta(factors["first"])).T + first.bias)
    expected = hidden @ (second.weight + delta(factors["second"])).T + second.bias

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(out))
    run_options = onnxruntime.RunOptions()
    run_options.add_active_adapter(adapter)
    found = session.run(None, {"x": x.numpy()}, run_options)[0]
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


def test_json_and_a_measured_gauge(tiny: Path, run: Run, factory_folder: Path, tmp_path: Path):
    half = tmp_path / "half.onnx"
    options = ("--mode", "adapters", "--adapter-precision", "float16", "--adapter-form", "required")
    result = run("export", "tiny_models:with_shapes", "--adapter", tiny, "--out", half, *options)
    assert result.exit_code == 0, result.output
    assert not {t.name for t in onnx.load(half).graph.initializer} & {"first.lora_A"}
    out, report = tmp_path / "a.safetensors", tmp_path / "report.json"
    command = ("onnx-adapter", half, "--adapter", tiny, "--out", out, "--gauge", "auto")
    result = run(*command, "--json", "--report", report)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == json.loads(report.read_text())
    assert set(said["loss_by_gauge"]) == {"trained", "balanced", "equal_energy"}
    assert 1e-6 < said["loss"] < 1e-2


@pytest.mark.usefixtures("unchanged_after_setup")
class TestRefusals:
    def test_a_graph_without_inputs(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        out = tmp_path / "a.onnx_adapter"
        said = fails("GRAPH", "onnx-adapter", tmp_path / "no.onnx", "--adapter", tiny, "--out", out)
        assert "no file" in said

    def test_the_suffix(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        fails("--out", "onnx-adapter", "g.onnx", "--adapter", tiny, "--out", tmp_path / "a.bin")

    def test_targets_without_the_mode(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny, "--targets", "first")
        assert "mode" in fails("BASE", *arguments, "--out", tmp_path / "m.onnx")

    def test_targets_that_are_none(self, fails: Fails, tmp_path: Path) -> None:
        arguments = (
            "export",
            "tiny_models:with_inputs",
            "--mode",
            "adapters",
            "--targets",
            "third",
        )
        assert "third" in fails("--targets", *arguments, "--out", tmp_path / "m.onnx")


def test_an_adapter_that_does_not_fit(
    graph: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    folder, _ = make_adapter("bert")
    out = tmp_path / "a.onnx_adapter"
    said = fails("--adapter", "onnx-adapter", graph, "--adapter", folder, "--out", out)
    assert "no inputs" in said
    assert not out.exists()
