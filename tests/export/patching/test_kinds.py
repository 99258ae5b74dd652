"""DoRA, embeddings, convolutions and biases in files, against sums by hand in float64."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from onnx_layouts import arrays_of, write_adapter, write_quantized
from torch import Tensor, nn

from gauge_ext.checkpoint import read_adapter
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, ConfigError
from gauge_ext.export import merge_checkpoint, patch_onnx
from gauge_ext.export.patching import update as update_module

peft = pytest.importorskip("peft")

LAYERS = ["embed", "conv", "up", "down"]
EXPORTERS = {
    "dynamo": {"dynamo": True},
    "plain": {"dynamo": True, "optimize": False},
    "legacy": {"dynamo": False},
}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.down(torch.relu(self.up(hidden)))


@pytest.fixture
def model() -> Mixed:
    return Mixed().eval()


def save(
    model: nn.Module, folder: Path, targets: list[str] = LAYERS, *, rank: int = 3, **fields: Any
) -> Path:
    """An adapter of PEFT's with random numbers."""
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT cannot merge some of them
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if "magnitude" in name:
                parameter.abs_().add_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a bias has one dimension
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_hand(model: nn.Module, folder: Path, scaling: float = 2.0) -> nn.Module:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    merged = copy.deepcopy(model).double()
    for path, layer in merged.named_children():
        said = {
            key.removeprefix(f"base_model.model.{path}."): tensor.double()
            for key, tensor in tensors.items()
            if key.startswith(f"base_model.model.{path}.")
        }
        if not said:
            continue
        embedding = path == "embed"
        names = ("lora_embedding_A", "lora_embedding_B")
        a, b = (said[n] for n in (names if embedding else ("lora_A.weight", "lora_B.weight")))
        weight = layer.weight.data.T if embedding else layer.weight.data.flatten(1)
        total = weight + scaling * b.reshape(-1, 3) @ a.reshape(3, -1)
        if "lora_magnitude_vector" in said:
            total = said["lora_magnitude_vector"].reshape(-1, 1) * nn.functional.normalize(total)
        layer.weight.data = (total.T if embedding else total).reshape(layer.weight.shape)
        if "lora_B.bias" in said:
            layer.bias.data += scaling * said["lora_B.bias"]
    return merged


def export(model: nn.Module, x: Tensor, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the older exporter is deprecated
        axes = {"input_names": ["x"], "verbose": False}
        torch.onnx.export(model, (x,), path, **axes, **options)
    return path


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


IDS = torch.tensor([[1, 10, 3, 3, 0], [5, 6, 7, 8, 9]])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_kind_in_a_graph(exporter, dora, model, tmp_path, monkeypatch):
    monkeypatch.setattr(update_module, "CHUNK", 4 * 12 * 3)  # blocks of a few rows
    base = export(model, IDS, tmp_path / "base.onnx", **EXPORTERS[exporter])
    adapter = save(model, tmp_path / "adapter", use_dora=dora)
    report = patch_onnx(base, adapter, tmp_path / "out.onnx", verify=True)
    assert {weight.module for weight in report.weights} == set(LAYERS)
    layouts = {weight.module: weight.layout for weight in report.weights}
    assert layouts["conv"] == "(out, in, kernel)"
    assert layouts["embed"] == "(in, out)"
    expected = merged_by_hand(model, adapter)(IDS)
    torch.testing.assert_close(
        run(tmp_path / "out.onnx", IDS), expected.float(), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(run(base, IDS).double(), expected, atol=0.1)
    assert report.difference is not None
    assert report.difference < 1e-5


def in_folder(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("targets", "fields"),
    [(LAYERS, {}), (LAYERS, {"use_dora": True}), (["up"], {"lora_bias": True})],
    ids=["lora", "dora", "bias"],
)
def test_every_kind_in_a_checkpoint(targets, fields, model, tmp_path, monkeypatch):
    monkeypatch.setattr(update_module, "CHUNK", 4 * 12 * 3)
    base = in_folder(model, tmp_path / "base")
    adapter = save(model, tmp_path / "adapter", targets, **fields)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    expected = merged_by_hand(model, adapter).state_dict()
    biases = {"up.bias"} if "lora_bias" in fields else set()
    assert set(report.merged) == {f"{path}.weight" for path in targets} | biases
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor, model.state_dict()[name]) == (name not in report.merged)
    assert report.adapter_sha256 == read_adapter(adapter).sha256


def test_the_lengths_of_a_row_of_zeros(tmp_path):
    """Of 0/0 comes 0, as in torch."""
    model = Mixed()
    with torch.no_grad():
        model.up.weight[2] = 0
    base, adapter = in_folder(model, tmp_path / "base"), tmp_path / "adapter"
    save(model, adapter, ["up"], use_dora=True)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.up.lora_B.weight"][2] = 0
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    merge_checkpoint(base, adapter, tmp_path / "out")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["up.weight"]
    assert not found[2].any()
    expected = merged_by_hand(model, adapter).up.weight
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_in_blocks(bits, few_rows, tmp_path):
    few_rows(5, decoded=96, stored=96 * bits // 8 + 3 * 4 + (3 * bits + 7) // 8)
    weight = np.random.default_rng(3).standard_normal((24, 80)).astype("f4")
    base, held = write_quantized(tmp_path / "b.onnx", weight, bits=bits, size=32, with_zero=True)
    adapter = tmp_path / "adapter"
    update = write_adapter(adapter, {"a": (24, 80)}, use_dora=True)["a"]
    magnitude = np.linspace(1, 20, 24, dtype="f4")
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["base_model.model.a.lora_magnitude_vector"] = magnitude
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    report = patch_onnx(base, adapter, tmp_path / "o.onnx", verify=True)
    total = held + update
    wanted = total * (magnitude / np.linalg.norm(total, axis=1))[:, None]
    x = torch.eye(80)
    got = run(tmp_path / "o.onnx", x).numpy().T
    loss = report.weights[0].loss
    error = np.linalg.norm(got - wanted)
    assert error / np.linalg.norm(wanted) == pytest.approx(loss.of_weight, rel=0.02, abs=1e-4)
    assert error / np.linalg.norm(wanted - held) == pytest.approx(
        loss.of_update, rel=0.02, abs=1e-4
    )
    assert loss.of_weight < (0.12 if bits == 4 else 0.01)


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_normalization_in_the_weight_is_seen(layer, tmp_path):
    """torch.onnx.export multiplies it into the weight, and leaves the weight its name."""
    if layer == "linear":
        model, x = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(4, 8)
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 3, 8, 8)
    model[1].running_var.fill_(9.0)
    model.eval()
    adapter = save(model, tmp_path / "adapter", ["0"])
    folded = export(model, x, tmp_path / "folded.onnx", dynamo=True)
    assert not np.allclose(arrays_of(folded)["0.weight"], model[0].weight.detach())
    with pytest.raises(AdapterMismatchError, match="'0', has a batch normalization multiplied"):
        patch_onnx(folded, adapter, tmp_path / "out.onnx")
    whole = export(model, x, tmp_path / "whole.onnx", dynamo=True, optimize=False)
    patch_onnx(whole, adapter, tmp_path / "out.onnx", verify=True)
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.0.lora_{f}.weight"] for f in "AB")
    with torch.no_grad():
        model[0].weight += 2.0 * (b.reshape(-1, 3) @ a.reshape(3, -1)).view_as(model[0].weight)
    torch.testing.assert_close(run(tmp_path / "out.onnx", x), model(x).detach())


def test_a_nameless_convolution_may_be_one_with_a_normalization(tmp_path):
    """The older exporter's node says "0", and its weight is another one."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    model[1].running_var.fill_(9.0)
    adapter = save(model, tmp_path / "adapter", ["0"])
    path = export(model, torch.randn(2, 3, 8, 8), tmp_path / "b.onnx", dynamo=False)
    assert onnx.load(str(path)).graph.node[0].name == "/0/Conv"
    with pytest.raises(AdapterMismatchError, match="1 convolution weights have the first one's"):
        patch_onnx(path, adapter, tmp_path / "out.onnx")
    base = in_folder(model, tmp_path / "base")
    with pytest.raises(AdapterMismatchError, match="no unique weight"):
        patch_onnx(path, adapter, tmp_path / "out.onnx", base_weights=base)


def test_nameless_ones_by_their_values(model, tmp_path):
    base = export(model, IDS, tmp_path / "base.onnx", dynamo=True)
    graph = onnx.load(str(base))
    names = {tensor.name: f"t{i}" for i, tensor in enumerate(graph.graph.initializer)}
    for tensor in graph.graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.name = ""
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    del graph.graph.value_info[:]
    onnx.save(graph, str(base))
    adapter = save(model, tmp_path / "adapter")
    with pytest.raises(AdapterMismatchError, match=r"'conv' \(12, 24\)"):
        patch_onnx(base, adapter, tmp_path / "out.onnx")
    folder = in_folder(model, tmp_path / "base")
    patch_onnx(base, adapter, tmp_path / "out.onnx", base_weights=folder)
    expected = merged_by_hand(model, adapter)(IDS)
    torch.testing.assert_close(
        run(tmp_path / "out.onnx", IDS), expected.float(), rtol=1e-5, atol=1e-5
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("target", ["embed", "head"])
def test_tied_layers_are_patched_where_the_graph_has_two_copies(target, tmp_path):
    model = Tied().eval()
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    adapter = save(untied, tmp_path / "adapter", [target])
    base = export(model, IDS, tmp_path / "base.onnx", dynamo=True)
    patch_onnx(base, adapter, tmp_path / "out.onnx")
    expected = merged_by_hand(untied, adapter)(IDS)
    torch.testing.assert_close(
        run(tmp_path / "out.onnx", IDS), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("target", ["embed", "head"])
def test_tied_layers_are_refused(target, tmp_path):
    model = Tied().eval()
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    adapter = save(untied, tmp_path / "adapter", [target])
    base = export(model, IDS, tmp_path / "base.onnx", dynamo=True, optimize=False)
    with pytest.raises(AdapterMismatchError, match=f"the weight of '{target}', is tied"):
        patch_onnx(base, adapter, tmp_path / "out.onnx")


def test_what_cannot_be_merged_says_why(model, tmp_path):
    base = in_folder(model, tmp_path / "base")
    one, two = (save(model, tmp_path / n, ["up"], use_dora=True) for n in ("one", "two"))
    with pytest.raises(ConfigError, match="2 adapters change 'up', one of them with DoRA"):
        merge_checkpoint(base, [(one, 1.0), (two, 1.0)], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"its weight must be 1, got 0\.5"):
        merge_checkpoint(base, {one: 0.5}, tmp_path / "out")
    bias = save(model, tmp_path / "bias", ["up"], lora_bias=True)
    graph = export(model, IDS, tmp_path / "base.onnx", dynamo=True)
    with pytest.raises(ConfigError, match="changes the bias of 'up'"):
        patch_onnx(graph, bias, tmp_path / "out.onnx")
    state = {k: v for k, v in model.state_dict().items() if k != "up.bias"}
    safetensors.torch.save_file(state, base / "model.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"10 numbers for 'up'.*has no up\.bias"):
        merge_checkpoint(base, bias, tmp_path / "out")
    said = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**said, "use_dora": False}))
    with pytest.raises(AdapterFormatError, match="use_dora = False, and .* a lora_magnitude of"):
        merge_checkpoint(base, one, tmp_path / "out")


def test_a_grouped_convolution_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv1d(8, 12, 3, groups=2))
    base = in_folder(model, tmp_path / "base")
    adapter = save(model, tmp_path / "adapter", ["0"], rank=4)
    with pytest.raises(AdapterFormatError, match=r"grouped convolutions are merged in torch"):
        merge_checkpoint(base, adapter, tmp_path / "out")
