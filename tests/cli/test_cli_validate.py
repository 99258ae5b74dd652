"""``gauge-ext validate``: agrees with the model a file was made from, and with no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
Factors = dict[str, tuple[Tensor, Tensor]]
MakeAdapter = Callable[..., tuple[Path, Factors]]


@pytest.fixture
def against(bert_source: Path) -> tuple[str, Path]:
    return ("--against", bert_source)


def test_the_model_it_was_made_from(
    exported_bert: Path,
    against: tuple[str, Path],
    make_adapter: MakeAdapter,
    run: Run,
    tmp_path: Path,
) -> None:
    adapter, _ = make_adapter("bert")
    report = tmp_path / "report.json"
    arguments = ("validate", exported_bert, *against, "--adapter", adapter)
    result = run(*arguments, "--json", "--report", report, "--random-cases", 1, "--seed", 5)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(report.read_text())
    assert found["passed"] is True
    assert found["validations"][0]["cases"][0]["sizes"] == {"batch": 2, "sequence": 16}


def test_a_tolerance_that_is_not_met(
    exported_bert: Path, against: tuple[str, Path], make_adapter: MakeAdapter, fails: Fails
) -> None:
    adapter, _ = make_adapter("bert")
    arguments = ("validate", exported_bert, *against, "--adapter", adapter)
    said = fails("--tolerance", *arguments, "--tolerance", "1e-14", writes=True)
    assert "disagrees with torch" in said


def test_another_adapter(
    exported_bert: Path, against: tuple[str, Path], make_adapter: MakeAdapter, run: Run
) -> None:
    def spoil(factors: Factors) -> None:
        for _, lora_B in factors.values():
            lora_B.mul_(1.5)

    adapter, _ = make_adapter("bert", spoil=spoil)
    result = run("validate", exported_bert, *against, "--adapter", adapter, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert result.stderr.startswith("error: --tolerance: ")


@pytest.mark.usefixtures("factory_folder")
def test_another_model(exported_bert: Path, tiny: Path, fails: Fails) -> None:
    against = ("--against", "tiny_models:with_inputs", "--adapter", tiny)
    said = fails("FILE", "validate", exported_bert, *against)
    assert "inputs" in said


def test_a_missing_file(against: tuple[str, Path], fails: Fails, tmp_path: Path) -> None:
    said = fails("FILE", "validate", tmp_path / "none.onnx", *against)
    assert "none.onnx" in said


def test_a_file_that_is_no_graph(
    exported_bert: Path,
    against: tuple[str, Path],
    make_adapter: MakeAdapter,
    fails: Fails,
    tmp_path: Path,
) -> None:
    adapter, _ = make_adapter("bert")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(exported_bert.read_bytes()[:2000])
    said = fails("FILE", "validate", cut, *against, "--adapter", adapter)
    assert "cut.onnx" in said


def test_bad_bases_name_the_option_that_gave_them(
    exported_bert: Path, bert_folder: Path, fails: Fails
) -> None:
    said = fails("--against", "validate", exported_bert, "--against", "nowhere")
    assert "no such folder" in said
    (bert_folder / "model.safetensors").unlink()
    fails("--against", "validate", exported_bert, "--against", bert_folder)


def test_a_report_that_cannot_be_written(
    exported_bert: Path,
    against: tuple[str, Path],
    make_adapter: MakeAdapter,
    fails: Fails,
    tmp_path: Path,
) -> None:
    adapter, _ = make_adapter("bert")
    arguments = ("validate", exported_bert, *against, "--adapter", adapter)
    fails("--report", *arguments, "--report", tmp_path)


def test_external_data_that_is_missing(
    exported_bert: Path, bert_source: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    adapter, _ = make_adapter("bert")
    import onnx

    model = onnx.load(exported_bert)
    split = tmp_path / "split.onnx"
    onnx.save(model, split, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    said = fails("FILE", "validate", split, "--against", bert_source, "--adapter", adapter)
    assert "split.onnx" in said


def test_every_runtime_is_a_choice() -> None:
    from gauge_ext.cli.validate import RuntimeChoice
    from gauge_ext.export.proof.runtimes import RUNTIMES

    assert [choice.value for choice in RuntimeChoice] == [*RUNTIMES, "all"]
