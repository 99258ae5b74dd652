"""Files that somebody spoiled on purpose: an error that names them, and no memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import gauge_ext
from gauge_ext.errors import AdapterFormatError, ConfigError, ExportError
from gauge_ext.export import (
    AdapterSession,
    OnnxGenerator,
    QuantizationOptions,
    export_onnx,
    quantize_onnx,
    read_provenance,
    validate_onnx,
    write_onnx_adapter,
)
from gauge_ext.export.language.prompt import start_token
from gauge_ext.export.precision.quantize_methods import PRECISIONS

TABLE = "gauge_ext.adapter_inputs"
X = np.linspace(-1, 1, 18, dtype=np.float32).reshape(3, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory, attach) -> tuple[nn.Module, Path]:
    """A model with an adapter; its graphs, open and merged, and the adapter's folder and file."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = attach(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    for name, mode in (("open.onnx", "adapters"), ("merged.onnx", "merged")):
        export_onnx(model, (torch.from_numpy(X),), folder / name, mode=mode, validate=False)
    gauge_ext.save_adapter(model, folder / "adapter")
    write_onnx_adapter(folder / "adapter", folder / "open.onnx", folder / "a.safetensors")
    return model, folder


def spoiled(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def saying(key: str, text: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (entry,) = (entry for entry in model.metadata_props if entry.key == key)
        entry.value = text

    return change


@pytest.mark.parametrize("form", ["optional", "required"])
@pytest.mark.parametrize(
    ("field", "size"), [("in", 10**18), ("in", -3), ("in", 0), ("out", 2**31 - 1), ("out", 7)]
)
def test_a_table_of_inputs_that_the_graph_has_not(field, size, form, made, tmp_path):
    _, folder = made
    table = json.loads(
        {e.key: e.value for e in onnx.load(folder / "open.onnx").metadata_props}[TABLE]
    )
    table["form"] = form
    table["layers"]["0"][field] = size
    path = spoiled(folder / "open.onnx", tmp_path / "m.onnx", saying(TABLE, json.dumps(table)))
    calibrated = QuantizationOptions(calibration=[{"input": X}])
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=TABLE):
            AdapterSession(path)
        with pytest.raises(ConfigError, match=TABLE):
            write_onnx_adapter(folder / "adapter", path, tmp_path / "a.safetensors")
        for precision in PRECISIONS[1:]:
            with pytest.raises(ConfigError, match=TABLE):
                quantize_onnx(path, tmp_path / "q.onnx", precision, options=calibrated)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("key", ["parameters", "dynamic_dims", "adapter_inputs"])
def test_metadata_that_is_no_json(key, made, tmp_path):
    _, folder = made
    change = saying(f"gauge_ext.{key}", "{")
    path = spoiled(folder / "open.onnx", tmp_path / "m.onnx", change)
    with pytest.raises(ConfigError, match=rf"m\.onnx is damaged.*gauge_ext\.{key} is no JSON"):
        read_provenance(path)


def test_metadata_that_is_no_text(made, tmp_path):
    model, folder = made
    path = tmp_path / "m.onnx"
    data = (folder / "merged.onnx").read_bytes()
    path.write_bytes(data.replace(b"gauge_ext.version", b"gauge_ext.v\xff\xffsion"))
    with pytest.raises(ConfigError, match="its metadata is no text"):
        read_provenance(path)
    for use in (
        lambda: AdapterSession(path),
        lambda: validate_onnx(path, model, (torch.from_numpy(X),)),
    ):
        with pytest.raises(ExportError, match=r"cannot load m\.onnx.*utf-8"):
            use()


@pytest.mark.parametrize("text", ["abc", "-1", "", "²"])
def test_an_adapters_file_with_a_version_that_is_no_number(text, made, tmp_path):
    _, folder = made
    with safetensors.safe_open(folder / "a.safetensors", "numpy") as file:
        said = file.metadata()
    path = tmp_path / "a.safetensors"
    arrays = load_file(folder / "a.safetensors")
    save_file(arrays, path, metadata={**said, "gauge_ext.graph_version": text})
    with pytest.raises(AdapterFormatError, match="was not written for a graph: its gauge_ext"):
        AdapterSession(folder / "open.onnx").add("a", path)
    save_file(arrays, path, metadata={**said, "gauge_ext.loss": "{"})
    with pytest.raises(ConfigError, match=r"gauge_ext\.loss is no JSON"):
        read_provenance(path)


@pytest.mark.parametrize("dims", [[2**40, 2**40], [10**6, 10**6], [2**62], [0, 6], [-1, 30]])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_shapes_that_the_numbers_do_not_fill(precision, dims, made, tmp_path):
    _, folder = made

    def change(model: onnx.ModelProto) -> None:
        weight = next(t for t in model.graph.initializer if list(t.dims) == [5, 6])
        del weight.dims[:]
        weight.dims.extend(dims)

    path = spoiled(folder / "merged.onnx", tmp_path / "m.onnx", change)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"not a whole ONNX file.* has 30 numbers"):
            quantize_onnx(path, tmp_path / "q.onnx", precision)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("text", ["[]", "3", "{", '"a"'])
def test_settings_that_are_none(text, exported_llama, tmp_path):
    _, folder, _ = exported_llama
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json (must hold|cannot be read)"):
        OnnxGenerator(tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config\.json (must hold|cannot be read)"):
        start_token(tmp_path)
