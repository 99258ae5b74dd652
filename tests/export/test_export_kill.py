"""Exports killed at every call that changes a file: the old file is there or the new one, whole."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
import onnxruntime
import pytest
import torch
from killing import killed
from onnx_layouts import arrays_of
from torch import nn

import gauge_ext
from gauge_ext.export import export_onnx, quantize_onnx, write_onnx_adapter
from gauge_ext.export.adapters.file import read_table
from gauge_ext.export.adapters.read import read_arrays

_EXPORT = """
import torch
from torch import nn
from gauge_ext.export import to_onnx

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(48, 40), nn.Tanh())
build, made = to_onnx.build_graph, []

def once(*arguments, **options):  # tracing takes most of the time, and changes no file
    if not made:
        made.append(build(*arguments, **options))
    return made[0]

to_onnx.build_graph = once

def export(path):
    example = (torch.ones(2, 48),)
    to_onnx.export_onnx(model, example, path, external_data=EXTERNAL, validate=False)

export(FIRST)
work = lambda: export(OUT)
"""


def weights(path) -> dict[str, str]:
    return {name: sha256(a.tobytes()).hexdigest() for name, a in arrays_of(path).items()}


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
def test_export_onnx(external, tmp_path):
    folder = tmp_path / "out"
    out = folder / "m.onnx"
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(48, 40), nn.Tanh())
    export_onnx(before, (torch.ones(2, 48),), out, external_data=external, validate=False)
    old = weights(out)
    names = f"EXTERNAL, FIRST = {external!r}, {str(tmp_path / 'first' / 'm.onnx')!r}\n"
    states = killed(names + _EXPORT, out)
    new = weights(out)
    assert old != new == states[-1]
    assert states[0] == old
    assert all(state in (old, new) for state in states)
    assert len(states) > 10
    torch.manual_seed(1)
    after = nn.Sequential(nn.Linear(48, 40), nn.Tanh())
    x = torch.randn(2, 48)
    (found,) = onnxruntime.InferenceSession(str(out)).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, after(x).detach().numpy(), atol=1e-5)
    # Nothing hidden is left, and one file of weights.
    beside = [file.name for file in folder.iterdir() if file != out]
    assert len(beside) == int(external)
    assert all(name.endswith(".data") for name in beside)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_quantize_onnx(precision, tmp_path):
    graphs, out = [tmp_path / f"{seed}.onnx" for seed in (0, 1)], tmp_path / "out" / "m.onnx"
    for seed, graph in enumerate(graphs):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(48, 40), nn.Tanh())
        export_onnx(model, (torch.ones(2, 48),), graph, validate=False)
    quantize_onnx(graphs[0], out, precision)
    old = weights(out)
    source = f"""
from gauge_ext.export import quantize_onnx
work = lambda: quantize_onnx({str(graphs[1])!r}, OUT, {precision!r})
"""
    states = killed(source, out)
    new = weights(out)
    assert old != new == states[-1]
    assert states[0] == old
    assert all(state in (old, new) for state in states)
    assert len(states) > 5
    (found,) = onnxruntime.InferenceSession(str(out)).run(None, {"input": np.ones((2, 48), "f4")})
    np.testing.assert_allclose(found, model(torch.ones(2, 48)).detach().numpy(), atol=0.2)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", ["onnx_adapter", "safetensors"])
def test_write_onnx_adapter(suffix, mlp, adapted, tmp_path):
    model = adapted(mlp)
    graph, out = tmp_path / "graph" / "m.onnx", tmp_path / "out" / f"a.{suffix}"
    report = export_onnx(model, (torch.randn(2, 12),), graph, mode="adapters", validate=False)
    assert report.adapter_inputs
    write_onnx_adapter(model, graph, out)
    old = {str(out): sha256(out.read_bytes()).hexdigest()}
    with torch.no_grad():
        model.up.lora_B.mul_(2.0)
    gauge_ext.save_adapter(model, tmp_path / "adapter")
    source = f"""
from gauge_ext.export.adapters.file import write_onnx_adapter
adapter, graph = {str(tmp_path / "adapter")!r}, {str(graph)!r}
write_onnx_adapter(adapter, graph, {str(tmp_path / "first" / out.name)!r})
work = lambda: write_onnx_adapter(adapter, graph, OUT)
"""
    states = killed(source, out)
    assert old != states[-1]
    assert states[0] == old
    assert all(state in (old, states[-1]) for state in states)
    assert len(states) > 8
    found = read_arrays(read_table(graph), out, "a")["up.lora_B"]
    expected = (model.up.scaling * model.up.lora_B).detach().numpy().T
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def test_a_folder_of_a_model_that_generates(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "place" / "onnx"
    source = f"""
from language_models import build
from gauge_ext.export.language import folder as road
from gauge_ext.export.language.causal_lm import export_causal_lm
from gauge_ext.export.report import ExportReport

def graph(step, example, path, **_):  # what export_onnx leaves is tested above
    path.write_bytes(bytes(range(256)) * 64)
    shapes = {{"past_key_values.0.key": ("batch_size", 2, "past_sequence_length", 4)}}
    said = {{"base_sha256": "0" * 64}}
    return ExportReport(path, (path,), 0, 20, shapes, {{}}, {{}}, said)

road.export_onnx = graph
model = build("llama")
export_causal_lm(model, {str(tmp_path / "first")!r}, validate=False)
work = lambda: export_causal_lm(model, OUT, validate=False)
"""
    states = killed(source, out, keep=False)
    complete = states[-1]
    names = {"config.json", "gauge_ext.json", "genai_config.json", "generation_config.json"}
    assert {name.rpartition("/")[2] for name in complete} == names | {"model.onnx"}
    assert all(state in ({}, complete) for state in states)
    assert states.count({}) > 10
    manifest = json.loads((out / "gauge_ext.json").read_text())
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256((out / name).read_bytes()).hexdigest()
    assert manifest["files"].keys() | {"gauge_ext.json"} == names | {"model.onnx"}
    assert manifest["graphs"]["model.onnx"]["base_sha256"] == "0" * 64
    assert [file.name for file in out.parent.iterdir()] == ["onnx"]
