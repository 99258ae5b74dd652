"""The files that fit a graph: names, layout, scaling, precision, gauges, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch

from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError, WriteError
from gauge_ext.export import export_onnx, write_onnx_adapter
from gauge_ext.export.adapters.file import read_table


@pytest.fixture
def graph(mlp, tmp_path) -> Path:
    path = tmp_path / "graph.onnx"
    options = {"mode": "adapters", "adapter_targets": ["up", "down"], "validate": False}
    export_onnx(mlp, (torch.randn(2, 12),), path, **options)
    return path


@pytest.fixture
def narrow(mlp, tmp_path):
    def make(precision: str) -> Path:
        path = tmp_path / f"{precision}.onnx"
        export_onnx(
            mlp,
            (torch.randn(2, 12),),
            path,
            mode="adapters",
            adapter_targets=["up", "down"],
            adapter_precision=precision,
            validate=False,
        )
        return path

    return make


def test_tensors_by_hand(graph, mlp, make_peft_adapter, tmp_path):
    folder = make_peft_adapter(
        mlp,
        r=3,
        lora_alpha=5,
        target_modules=["up", "down"],
        alpha_pattern={"down": 7},
        rank_pattern={"down": 2},
    )
    report = write_onnx_adapter(folder, graph, tmp_path / "a.onnx_adapter")
    assert report.ranks == {"block.down": 2, "up": 3}
    assert report.loss < 1e-12
    assert report.missing == ()
    file = onnxruntime.AdapterFormat.read_adapter(str(report.path))
    found = {name: value.numpy() for name, value in file.get_parameters().items()}
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    for name, scaling in (("up", 5 / 3), ("block.down", 7 / 2)):
        a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        np.testing.assert_allclose(found.pop(f"{name}.lora_A"), a.T, rtol=1e-6)
        np.testing.assert_allclose(found.pop(f"{name}.lora_B"), scaling * b.T, rtol=1e-6)
    assert not found

    write_onnx_adapter(folder, graph, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as tensors:
        assert tensors.metadata()["gauge_ext.adapter_sha256"] == report.adapter_sha256
        b = tensors.get_tensor("up.lora_B")
    np.testing.assert_array_equal(b, file.get_parameters()["up.lora_B"].numpy())


def test_an_adapter_on_some_layers_and_from_a_model_in_memory(graph, mlp, adapted, tmp_path):
    model = adapted(mlp, target_modules=["up"])
    report = write_onnx_adapter(model, graph, tmp_path / "a.onnx_adapter")
    assert report.missing == ("block.down",)
    file = onnxruntime.AdapterFormat.read_adapter(str(report.path))
    assert set(file.get_parameters()) == {"up.lora_A", "up.lora_B"}


def test_an_adapter_that_was_trained_on_a_part_of_the_model(mlp, make_peft_adapter, tmp_path):
    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.encoder(x))

    path = tmp_path / "whole.onnx"
    options = {"mode": "adapters", "adapter_targets": "all-linear", "validate": False}
    export_onnx(Pipeline(), (torch.randn(2, 12),), path, **options)
    folder = make_peft_adapter(mlp, r=2, target_modules=["up"])
    report = write_onnx_adapter(folder, path, tmp_path / "a.onnx_adapter")
    assert list(report.ranks) == ["encoder.up"]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_auto_keeps_the_best_of_three_measured_gauges(precision, narrow, mlp, adapted, tmp_path):
    graph = narrow(precision)
    adapted(mlp)
    # A gauge that loses much: the first component of A is large, and of B small.
    for layer in (mlp.up, mlp.block["down"]):
        layer.lora_A.data *= torch.tensor([[300.0], [1.0], [0.01]])
        layer.lora_B.data *= torch.tensor([[1 / 300.0, 1.0, 100.0]])
        layer.lora_A.data = torch.linalg.qr(torch.randn(3, 3))[0] @ layer.lora_A.data
        layer.lora_B.data += 0.2 * torch.randn_like(layer.lora_B)
    report = write_onnx_adapter(mlp, graph, tmp_path / "a.onnx_adapter", gauge="auto")
    assert set(report.losses) == {"trained", "balanced", "equal_energy"}
    file = onnxruntime.AdapterFormat.read_adapter(str(report.path))
    arrays = {name: value.numpy().astype(float) for name, value in file.get_parameters().items()}
    for name, layer in (("up", mlp.up), ("block.down", mlp.block["down"])):
        found = {gauge: losses[name] for gauge, losses in report.losses.items()}
        assert found[report.gauges[name]] == min(found.values())
        assert max(found.values()) > 1.05 * min(found.values())
        # What is in the file, against the update by its definition.
        a, b = arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"]
        if precision == "int8":
            a = a * arrays[f"{name}.lora_A.scale"]
            b = b * arrays[f"{name}.lora_B.scale"][:, None]
        exact = (layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).detach().numpy()
        error = np.linalg.norm((a @ b).T - exact) / np.linalg.norm(exact)
        assert error == pytest.approx(min(found.values()), rel=1e-5)
    said = json.loads(report.to_json())
    assert said["loss"] <= min(said["loss_by_gauge"].values()) * (1 + 1e-12)


def test_a_fixed_gauge_is_that_gauge(graph, mlp, adapted, tmp_path):
    report = write_onnx_adapter(adapted(mlp), graph, tmp_path / "a.safetensors", gauge="balanced")
    assert set(report.losses) == {"balanced"}
    with safetensors.safe_open(report.path, framework="numpy") as tensors:
        a, b = tensors.get_tensor("up.lora_A"), tensors.get_tensor("up.lora_B")
    np.testing.assert_allclose(a.T @ a, b @ b.T, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def refuse(self, error, match, adapter, graph, tmp_path, name="a.onnx_adapter", **options):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error, match=match):
            write_onnx_adapter(adapter, graph, tmp_path / name, **options)
        assert sorted(tmp_path.iterdir()) == before

    def test_a_module_without_inputs(self, mlp, adapted, tmp_path):
        graph = tmp_path / "up.onnx"
        options = {"mode": "adapters", "adapter_targets": ["up"], "validate": False}
        export_onnx(mlp, (torch.randn(2, 12),), graph, **options)
        self.refuse(AdapterMismatchError, "'block.down'", adapted(mlp), graph, tmp_path)

    def test_other_sizes(self, graph, make_mlp, adapted, tmp_path):
        other = adapted(make_mlp(12, 24))
        self.refuse(
            AdapterMismatchError, r"24 outputs, the layer has 12 and 20", other, graph, tmp_path
        )

    def test_dora(self, graph, mlp, make_peft_adapter, tmp_path):
        folder = make_peft_adapter(mlp, r=2, target_modules=["up"], use_dora=True)
        self.refuse((ConfigError, AdapterMismatchError), "DoRA", folder, graph, tmp_path)

    def test_a_graph_without_inputs(self, mlp, adapted, tmp_path):
        graph = tmp_path / "merged.onnx"
        export_onnx(adapted(mlp), (torch.randn(2, 12),), graph, validate=False)
        self.refuse(ConfigError, "--mode adapters", mlp, graph, tmp_path)

    def test_no_graph(self, mlp, adapted, tmp_path):
        self.refuse(ConfigError, "no file", adapted(mlp), tmp_path / "none.onnx", tmp_path)

    def test_a_damaged_graph(self, graph, mlp, adapted, tmp_path):
        graph.write_bytes(graph.read_bytes()[:-100])
        self.refuse(ConfigError, "graph.onnx", adapted(mlp), graph, tmp_path)

    def test_the_suffix(self, graph, mlp, adapted, tmp_path):
        self.refuse(ConfigError, ".onnx_adapter", adapted(mlp), graph, tmp_path, name="a.bin")

    def test_the_gauge(self, graph, mlp, adapted, tmp_path):
        self.refuse(ConfigError, "gauge", adapted(mlp), graph, tmp_path, gauge="coulomb")

    def test_beyond_float16(self, narrow, mlp, adapted, tmp_path):
        model = adapted(mlp)
        model.up.lora_B.data *= 1e6
        graph = narrow("float16")
        self.refuse(NonFiniteError, "balanced", model, graph, tmp_path)
        write_onnx_adapter(model, graph, tmp_path / "a.onnx_adapter", gauge="balanced")

    def test_a_full_disk(self, graph, mlp, adapted, tmp_path, small_files):
        with small_files(700):
            self.refuse(WriteError, "nothing was left", adapted(mlp), graph, tmp_path)


def test_the_version_tells_bases_and_precisions_apart(graph, narrow, mlp, tmp_path):
    one, half = read_table(graph), read_table(narrow("float16"))
    assert 0 <= one.version < 2**31
    assert one.version != half.version
    mlp.up.weight.data[0, 0] += 1
    assert read_table(narrow("float32")).version != one.version
