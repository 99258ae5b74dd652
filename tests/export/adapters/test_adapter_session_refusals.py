"""Names, adapters and graphs that a session refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gauge_ext.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    ExportError,
    NonFiniteError,
)
from gauge_ext.export import AdapterSession, export_onnx


class TestRefusals:
    def test_names_of_inputs_and_outputs(self, session, x):
        with pytest.raises(ConfigError, match="no input 'z'; it has x"):
            session.run({"x": x, "z": x})
        with pytest.raises(ConfigError, match="'x' is not fed"):
            session.run({})
        with pytest.raises(ConfigError, match="no output 'z'; it has y, mean"):
            session.run({"x": x}, outputs=["z"])

    def test_an_output_without_rows(self, session, x):
        with pytest.raises(ConfigError, match="'mean'.*no axis 'batch'"):
            session.run({"x": x}, ["a", "b", "a", "b"])

    @pytest.mark.parametrize("choice", [{}, {"a": float("nan")}, {"a": True}, 3])
    def test_choices(self, choice, session, x):
        with pytest.raises((ConfigError, TypeError)):
            session.run({"x": x}, choice)

    def test_what_onnxruntime_refuses(self, session, x):
        with pytest.raises(ExportError, match="onnxruntime refuses to run"):
            session.run({"x": x.astype(np.float64)}, "a")

    @pytest.mark.parametrize(
        ("arrays", "error", "match"),
        [
            ({"up.lora_A": np.zeros((6, 2))}, AdapterMismatchError, "float32.*got float64"),
            ({"up.lora_A": np.zeros((7, 2), "f")}, AdapterMismatchError, r"\[6, 'r0'\]"),
            ({"no.lora_A": np.zeros((6, 2), "f")}, AdapterMismatchError, "no adapter inputs"),
            ({"up.lora_A": np.zeros((6, 2), "f")}, AdapterMismatchError, "lacks 'up.lora_B'"),
            (
                {"up.lora_A": np.zeros((6, 2), "f"), "up.lora_B": np.zeros((3, 10), "f")},
                AdapterMismatchError,
                "rank 3.*rank 2",
            ),
            (
                {"up.lora_A": np.full((6, 1), np.nan, "f"), "up.lora_B": np.zeros((1, 10), "f")},
                NonFiniteError,
                "up.lora_A",
            ),
        ],
    )
    def test_arrays(self, arrays, error, match, session):
        with pytest.raises(error, match=match):
            session.add("c", arrays)
        assert session.adapters == ("a", "b")

    def test_a_name_that_is_taken(self, session, made):
        with pytest.raises(ConfigError, match="already"):
            session.add("a", made.folder / "a.onnx_adapter")

    def test_files(self, session, made, tmp_path):
        cut = tmp_path / "cut.onnx_adapter"
        cut.write_bytes((made.folder / "a.onnx_adapter").read_bytes()[:200])
        foreign = made.folder / "a" / "adapter_model.safetensors"
        for path, match in (
            (cut, "cut.onnx_adapter"),
            (foreign, "not written for a graph"),
            (tmp_path / "none", "there is no"),
            (made.graph, "must be a folder"),
        ):
            with pytest.raises(AdapterFormatError, match=match):
                session.add("c", path)

    def test_an_adapter_for_another_base_of_the_same_shape(self, made, tmp_path):
        other = copy.deepcopy(made.base)
        other.up.weight.data += 1
        graph = tmp_path / "other.onnx"
        options = {"mode": "adapters", "adapter_targets": "all-linear", "validate": False}
        export_onnx(other, (torch.randn(2, 5, 6),), graph, **options)
        with pytest.raises(AdapterMismatchError, match="another graph"):
            AdapterSession(graph, {"a": made.folder / "a.onnx_adapter"})
        fixed = AdapterSession(graph, {"a": made.folder / "a"})
        with pytest.raises(ConfigError, match="batch size of the graph is fixed"):
            fixed.run({"x": np.zeros((2, 5, 6), np.float32)}, ["a", "a"], outputs=["y"])

    def test_graphs(self, made, tmp_path):
        with pytest.raises(ConfigError, match="no file"):
            AdapterSession(tmp_path / "none.onnx")
        (tmp_path / "bad.onnx").write_bytes(b"no")
        with pytest.raises(ExportError, match=r"bad\.onnx"):
            AdapterSession(tmp_path / "bad.onnx")
        export_onnx(made.base, (torch.randn(2, 5, 6),), tmp_path / "m.onnx", validate=False)
        with pytest.raises(ConfigError, match="--mode adapters"):
            AdapterSession(tmp_path / "m.onnx")
