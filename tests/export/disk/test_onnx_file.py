"""What a file says about places and sizes, checked before anybody acts on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_layouts import random_weights, write_model

from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.onnx_file import open_onnx
from gauge_ext.export.disk.spans import read

SHAPES = {"a": (12, 8), "b": (20, 12)}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model with its weights in a file beside it."""
    folder = tmp_path / "model"
    return write_model(folder / "m.onnx", random_weights(SHAPES), ["gemm", "folded"], external=True)


Spoil = Callable[[onnx.TensorProto], None]


@pytest.fixture
def spoiled(outside: Path) -> Callable[[Spoil], Path]:
    """``spoiled(change)``: the file after a change of its first initializer."""

    def make(change: Spoil) -> Path:
        model = onnx.load(str(outside), load_external_data=False)
        change(model.graph.initializer[0])
        outside.write_bytes(model.SerializeToString())
        return outside

    return make


def say(**entries: object) -> Spoil:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key in entries:
                entry.value = str(entries[entry.key])

    return change


def test_weights_inside_and_outside(outside, tmp_path):
    weights = random_weights(SHAPES)
    inside = write_model(tmp_path / "i.onnx", weights, ["gemm", "folded"])
    for path in (outside, inside):
        found = open_onnx(path).initializers
        assert read(found["a.weight"].span) == weights["a"].tobytes()
        assert read(found["val_61"].span) == np.ascontiguousarray(weights["b"].T).tobytes()
        assert found["a.weight"].external is (path == outside)
    assert open_onnx(outside).nbytes == sum(p.stat().st_size for p in outside.parent.iterdir())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "x/../../secret", "", "a\0b"])
def test_paths_that_leave_the_folder(location, spoiled, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4000))
    with pytest.raises(ConfigError, match=r"'a\.weight'.*no path within the model's folder"):
        open_onnx(spoiled(say(location=location)))


def test_links_that_leave_the_folder(outside, tmp_path):
    data = outside.with_name("m.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"a link to .*elsewhere, outside the model's folder"):
        open_onnx(outside)


def test_a_cache_that_links_model_and_data_into_one_folder(outside, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(["m.onnx", "m.onnx.data"]):
        (outside.parent / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    assert "a.weight" in open_onnx(snapshot / "m.onnx").initializers


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "none"}, "there is no such file"),
        ({"offset": 10**9}, r"bytes 1,000,000,000 to .*, and the file has"),
        ({"offset": -4}, r"bytes -4 to"),
        ({"length": 10**12}, "and the file has"),
        ({"length": 4}, r"takes 384 bytes, and 4 are there"),
        ({"offset": "x"}, "at a place that is no number"),
        ({"offset": 16}, r"the data of 'a\.weight' and 'val_61' overlap"),
    ],
)
def test_places_that_are_not_there(entries, message, spoiled):
    with pytest.raises(ConfigError, match=message):
        open_onnx(spoiled(say(**entries)))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([-12, 8], r"impossible shape \[-12, 8\]"),
        ([2**40, 2**40], "impossible shape"),
        ([2**30, 2**20], "and the file has|takes .* bytes, and 384"),
        ([12, 9], "takes 432 bytes, and 384 are there"),
    ],
)
def test_impossible_shapes(dims, message, spoiled):
    def change(tensor: onnx.TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)

    with pytest.raises(ConfigError, match=message):
        open_onnx(spoiled(change))


def test_unknown_types_and_names_twice(outside, spoiled):
    def rename(tensor: onnx.TensorProto) -> None:
        tensor.name = "val_61"

    with pytest.raises(ConfigError, match="two initializers named 'val_61'"):
        open_onnx(spoiled(rename))

    def retype(tensor: onnx.TensorProto) -> None:
        tensor.data_type = 999

    with pytest.raises(ConfigError, match="of the unknown type 999"):
        open_onnx(spoiled(retype))


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="does not exist"):
        open_onnx(path)
    with pytest.raises(ConfigError, match="is a folder"):
        open_onnx(tmp_path)
    for content in (b"", b"\x0a\x01a", b"\x3a\x00"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="holds no graph"):
            open_onnx(path)
    path.write_bytes(b"\x3a\x03\x0a\x01\xff")  # walks, but is no Node
    with pytest.raises(ConfigError, match="is not an ONNX model"):
        open_onnx(path)


def test_a_fifo_is_not_waited_for(tmp_path, outside):
    (outside.parent / "m.onnx.data").unlink()
    os.mkfifo(outside.parent / "m.onnx.data")
    with pytest.raises(ConfigError, match="there is no such file"):
        open_onnx(outside)
