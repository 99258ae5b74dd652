"""Options, weights and files that are not quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gauge_ext.errors import ConfigError, NonFiniteError
from gauge_ext.export import QuantizationOptions, export_onnx, quantize_onnx


class TestRefusals:
    @pytest.mark.parametrize(
        ("precision", "options", "match"),
        [
            ("bf16", {}, "no bfloat16 MatMul"),
            ("int3", {}, "must be one of"),
            ("int8-static", {}, "none are given"),
            ("int4", {"block_size": 33}, "block_size"),
        ],
    )
    def test_options(self, precision, options, match, made, mlp, tmp_path):
        chosen = QuantizationOptions(**options)
        with pytest.raises(ConfigError, match=match):
            quantize_onnx(made, tmp_path / "m.onnx", precision, options=chosen)
        with pytest.raises(ConfigError, match=match):
            export_onnx(
                mlp,
                (torch.randn(2, 12),),
                tmp_path / "m.onnx",
                precision=precision,
                quantization=chosen,
            )
        assert not list(tmp_path.iterdir())

    def test_modes_dtypes_and_options_that_do_not_go_together(self, mlp, tmp_path):
        for model, options, match in (
            (mlp, {"quantization": QuantizationOptions()}, "precision is 'fp32'"),
            (copy.deepcopy(mlp).double(), {"precision": "int8"}, "float64"),
        ):
            x = torch.randn(2, 12, dtype=next(model.parameters()).dtype)
            with pytest.raises(ConfigError, match=match):
                export_onnx(model, (x,), tmp_path / "m.onnx", **options)

    def test_a_weight_beyond_float16(self, mlp, tmp_path):
        mlp.up.weight.data[1, 2] = 1e6
        export_onnx(mlp, (torch.randn(2, 12),), tmp_path / "m.onnx", validate=False)
        with pytest.raises(NonFiniteError, match=r"up\.weight.*keep="):
            quantize_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
        options = QuantizationOptions(keep=["up.weight"])
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16", options=options)

    def test_files_and_inputs(self, made, tmp_path):
        out = tmp_path / "m.onnx"
        with pytest.raises(ConfigError, match="no file"):
            quantize_onnx(tmp_path / "none.onnx", out, "int8")
        (tmp_path / "bad.onnx").write_bytes(b"bad")
        with pytest.raises(ConfigError, match=r"bad\.onnx is not a whole ONNX file"):
            quantize_onnx(tmp_path / "bad.onnx", out, "int8")
        beside = tmp_path / "beside.onnx"
        onnx.save(onnx.load(made), beside, save_as_external_data=True, location="weights")
        for spoil, why in (
            (lambda file: file.write_bytes(b"short"), "exceeds available data"),
            (Path.unlink, "is not regular file|doesn't exist"),
        ):
            spoil(tmp_path / "weights")
            with pytest.raises(ConfigError, match=rf"beside\.onnx is not a whole.*({why})"):
                quantize_onnx(beside, out, "int8")
        assert not out.exists()
        with pytest.raises(ConfigError, match="refuses the inputs 'input 1'"):
            quantize_onnx(made, out, "int8", inputs=[{"x": np.zeros(3)}])
        quantize_onnx(made, out, "int8")
        with pytest.raises(ConfigError, match="in int8 already"):
            quantize_onnx(out, tmp_path / "again.onnx", "int4")
