"""What an export refuses, and what is left on the disk then: nothing, or what was there before."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from gauge_ext.errors import (
    ConfigError,
    ExportError,
    NonFiniteError,
    ValidationError,
    WriteError,
)
from gauge_ext.export import Tolerance, export_onnx, to_onnx
from gauge_ext.export.trace import graph_file

BATCH = {"x": {0: "batch"}}


def test_one_file_beyond_protobufs_limit_is_refused(mlp, tmp_path, listing, monkeypatch):
    monkeypatch.setattr(graph_file, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(ConfigError, match="external_data=False"):
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx", external_data=False)
    assert listing() == []


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the graph go out with one entry of one weight that is off by a hundredth."""
    save = to_onnx.save_graph

    def spoiled(graph: Any, *args: Any) -> None:
        value = graph.model.graph.initializers["up.weight"]
        wrong = value.const_value.numpy().copy()
        wrong[0, 0] += 0.01
        value.const_value = onnx_ir.tensor(wrong, name="up.weight")
        save(graph, *args)

    monkeypatch.setattr(to_onnx, "save_graph", spoiled)


def test_failing_validation_leaves_nothing(mlp, tmp_path, listing, monkeypatch):
    spoil(monkeypatch)
    path = tmp_path / "new" / "deep" / "mlp.onnx"
    with pytest.raises(ValidationError, match=r"disagree.*'output'.*max abs") as caught:
        export_onnx(mlp, (torch.randn(2, 12),), path, external_data=True)
    assert listing() == []
    report = caught.value.report
    assert report.path == path
    assert not report.passed
    assert report.max_abs > 1e-4
    assert json.loads(report.to_json())["passed"] is False


def test_failing_validation_keeps_an_existing_file(mlp, tmp_path, listing, monkeypatch):
    path = tmp_path / "mlp.onnx"
    path.write_bytes(b"what was here before")
    (tmp_path / "mlp.onnx.data").write_bytes(b"and its data")
    spoil(monkeypatch)
    with pytest.raises(ValidationError):
        export_onnx(mlp, (torch.randn(2, 12),), path, external_data=True)
    assert listing() == ["mlp.onnx", "mlp.onnx.data"]
    assert path.read_bytes() == b"what was here before"
    assert (tmp_path / "mlp.onnx.data").read_bytes() == b"and its data"


def test_a_looser_tolerance_lets_it_pass_and_replaces_the_file(mlp, tmp_path, monkeypatch):
    spoil(monkeypatch)
    path = tmp_path / "mlp.onnx"
    path.write_bytes(b"what was here before")
    loose = Tolerance(absolute=0.1, relative=0.1, cosine=0.9)
    report = export_onnx(mlp, (torch.randn(2, 12),), path, tolerance=loose)
    assert report.validation.passed
    (stored,) = [t for t in onnx.load(path).graph.initializer if t.name == "up.weight"]
    off = onnx.numpy_helper.to_array(stored) - mlp.up.weight.detach().numpy()
    assert off[0, 0] == pytest.approx(0.01, abs=1e-6)


def test_unwritable_targets(mlp, tmp_path, listing):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "m.onnx", tmp_path, Path("/proc/nowhere/m.onnx")):
        with pytest.raises(WriteError, match="cannot write"):
            export_onnx(mlp, (torch.randn(2, 12),), target)
    assert listing() == ["file"]


@pytest.mark.parametrize("external", [True, False])
def test_a_write_that_stops_in_the_middle(mlp, external, tmp_path, listing, small_files):
    (tmp_path / "m.onnx").write_bytes(b"before")
    # A real limit of the kernel's, so that the writer itself meets a short write.
    with small_files(1000), pytest.raises(WriteError, match=r"m\.onnx") as caught:
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx", external_data=external)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert listing() == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"before"


def test_a_disk_that_fills_up(mlp, tmp_path, listing, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(WriteError, match=r"No space left on device.*Free some space"):
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx")
    assert listing() == []


def test_bfloat16_is_refused_before_anything_is_written(mlp, tmp_path, listing):
    with pytest.raises(ExportError, match=r"4 tensors are bfloat16.*'up.weight'.*model\.float"):
        export_onnx(mlp.to(torch.bfloat16), (torch.randn(2, 12).bfloat16(),), tmp_path / "m.onnx")
    assert listing() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(mlp, adapted, bad, tmp_path, listing):
    adapted(mlp)
    with torch.no_grad():
        mlp.block["down"].lora_B[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"block\.down\.lora_B .* in 1 of 15 entries"):
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx")
    assert listing() == []


def test_a_model_that_cannot_be_traced(tmp_path, listing):
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="torch cannot turn Branches into a graph"):
        export_onnx(Branches(), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert listing() == []


def test_an_axis_that_the_model_fixes(tmp_path, listing):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 3) * 2

    x = torch.randn(4, 3)
    with pytest.raises(ExportError, match=r"static shape of 4.*leave it out of dynamic_shapes"):
        export_onnx(Fixed(), (x,), tmp_path / "m.onnx", dynamic_shapes=BATCH)
    assert listing() == []
    report = export_onnx(Fixed(), (x,), tmp_path / "m.onnx", dynamic_shapes="auto")
    assert report.inputs == {"x": (4, 3)}


def test_sizes_that_torch_itself_refuses(tmp_path, listing):
    class AtMostFour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(x.shape[0]))

    x = torch.randn(3, 2)
    with pytest.raises(ConfigError, match=r"torch itself refuses the case.*batch=.*Dim\(name"):
        export_onnx(AtMostFour(), (x,), tmp_path / "m.onnx", dynamic_shapes=BATCH)
    assert listing() == []
    shapes = {"x": {0: torch.export.Dim("batch", max=4)}}
    report = export_onnx(AtMostFour(), (x,), tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert max(case.sizes["batch"] for case in report.validation.cases) == 4


def test_an_opset_that_the_converter_cannot_reach(tmp_path, listing):
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(-1)

    with pytest.raises(ExportError, match=r"cannot be written in opset 17.*opset 18 or later"):
        export_onnx(Mean(), (torch.randn(2, 3),), tmp_path / "m.onnx", opset=17)
    assert listing() == []


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("opset", 16, r"opset must be in 17\.\.25, got 16"),
        ("dynamic_shapes", {"z": {0: "batch"}}, r"names 'z', which is not among the inputs \(x\)"),
        ("dynamic_shapes", "automatic", r"must be None, 'auto'"),
        ("random_cases", -1, r"random_cases must be a count"),
        ("input_names", ["a", "b"], r"input_names has 2 names, the model has 1: x"),
        ("output_names", ["up.weight"], r"'up.weight' is the name of a parameter"),
        ("provenance", {"version": "2"}, r"'version' is written by gauge_ext itself"),
    ],
)
def test_arguments_that_cannot_be_used(mlp, argument, value, message, tmp_path, listing):
    with pytest.raises(ConfigError, match=message):
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx", **{argument: value})
    assert listing() == []
