"""``gauge-ext quantize`` and ``gauge-ext export --precision``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]

X = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)


@pytest.fixture
def exact(factory_folder: Path, tiny: Path, run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "fp32.onnx"
    options = ("--adapter", tiny, "--no-validate")
    result = run("export", "tiny_models:with_shapes", "--out", path, *options)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    np.savez(path, x=X)
    return path


def output(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": X})[0]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-static", "int4"])
def test_what_it_says_is_what_it_wrote(
    precision: str, exact: Path, inputs: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "small.onnx"
    calibration = ("--calibration", inputs) if precision == "int8-static" else ()
    options = ("--precision", precision, "--inputs", inputs, *calibration)
    result = run("quantize", exact, "--out", out, *options, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    difference = float(np.abs(output(out) - output(exact)).max())
    assert said["max_abs"] == pytest.approx(difference, rel=1e-5)
    assert difference > 0
    assert said["bytes_after"] == out.stat().st_size
    result = run("quantize", exact, "--out", out, *options)
    assert "first.weight" in result.stdout
    assert "outputs against the float32 graph" in result.stdout


def test_export_quantizes_after_the_merge(
    exact: Path, tiny: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "m.onnx"
    command = ("export", "tiny_models:with_shapes", "--adapter", tiny, "--out", out)
    result = run(*command, "--precision", "int8", "--min-cosine", "0.9", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["validation"]["passed"]
    assert said["quantization"]["tolerance"]["cosine"] == 0.9
    difference = np.abs(output(out) - output(exact)).max()
    assert 0 < difference < 0.2 * np.abs(output(exact)).max()


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "arguments", "said"),
        [
            ("--precision", ("--precision", "bf16"), "no bfloat16 MatMul"),
            ("--precision", ("--precision", "fp32"), "is what the file is in"),
            ("--calibration", ("--precision", "int8-static"), "none are given"),
            ("--block-size", ("--precision", "int4", "--block-size", "20"), "must be 16, 32"),
            ("--inputs", ("--min-cosine", "0.9"), "no output can be judged"),
            ("--inputs", ("--inputs", "fp32.onnx"), "no file of arrays"),
        ],
    )
    def test_options(
        self, option: str, arguments: tuple[str, ...], said: str, exact: Path, fails: Fails
    ) -> None:
        out = exact.with_name("small.onnx")
        assert said in fails(option, "quantize", exact, "--out", out, *arguments)
        assert not out.exists()

    def test_a_loss_beyond_the_bar(self, exact: Path, inputs: Path, fails: Fails) -> None:
        out = exact.with_name("small.onnx")
        arguments = ("quantize", exact, "--out", out, "--precision", "int4", "--inputs", inputs)
        assert "loses more" in fails("--max-loss", *arguments, "--max-loss", "1e-6")
        assert not out.exists()

    def test_options_of_fewer_bits_for_float32(self, tiny: Path, fails: Fails, tmp_path: Path):
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        out = tmp_path / "m.onnx"
        for option, value in (("--block-size", "32"), ("--min-cosine", "0.9"), ("--keep", "a")):
            assert "--precision" in fails(option, *arguments, option, value, "--out", out)

    @pytest.mark.parametrize(
        ("precision", "option", "about"),
        [
            ("fp16", "--block-size", "int4"),
            ("int8", "--calibration", "int8-static"),
            ("int4", "--full-range", "int8 or int8-static"),
        ],
    )
    def test_options_that_the_precision_has_no_use_for(
        self, exact: Path, inputs: Path, fails: Fails, precision: str, option: str, about: str
    ) -> None:
        value = {"--block-size": ("32",), "--calibration": (inputs,)}.get(option, ())
        out = exact.with_name("small.onnx")
        arguments = ("quantize", exact, "--out", out, "--precision", precision, option, *value)
        said = fails(option, *arguments)
        assert f"it is for --precision {about}, which is {precision}." in " ".join(said.split())
        assert not out.exists()

    def test_bfloat16_before_anything_is_loaded(self, fails: Fails, tmp_path: Path) -> None:
        out = tmp_path / "m.onnx"
        said = fails("--precision", "export", "no:such", "--out", out, "--precision", "bf16")
        assert "no bfloat16 MatMul" in said
