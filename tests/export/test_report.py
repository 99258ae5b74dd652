from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gauge_ext.export import CaseResult, ExportReport, OutputDifference, ValidationReport

GOOD = OutputDifference("y", "float32", (2, 3), 1e-6, 1e-7, 1.0, 0.5, 1e-4, True)
BAD = OutputDifference(
    "z", "float32", (2,), float("nan"), 0.1, None, None, 0.0, False, "has [shape]"
)


@pytest.fixture
def report() -> ValidationReport:
    cases = (
        CaseResult("example", {}, (GOOD,)),
        CaseResult("larger", {"batch": 4}, (GOOD, BAD)),
        CaseResult("random 1", {"batch": 1}, (), error="no kernel"),
    )
    return ValidationReport(Path("m.onnx"), "onnxruntime 1", cases)


def rendered(report: ValidationReport | ExportReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    report.render(console)
    return console.file.getvalue()


def test_passing_and_failing(report):
    assert [case.passed for case in report.cases] == [True, False, False]
    assert not report.passed
    assert ValidationReport(report.path, report.runtime, report.cases[:1]).passed
    assert report.failures == (
        "case 'larger' (batch=4), output 'z': has [shape]",
        "case 'random 1' (batch=1): onnxruntime refused to run: no kernel",
    )


def test_json_is_valid_where_numbers_are_not(report):
    found = json.loads(report.to_json())
    assert found["passed"] is False
    assert found["cases"][1]["outputs"][1]["max_abs"] is None
    assert found["cases"][1]["outputs"][0]["shape"] == [2, 3]
    assert found["cases"][1]["sizes"] == {"batch": 4}


def test_the_table_shows_every_case_and_takes_no_markup(report):
    text = rendered(report)
    for part in ("example", "larger", "batch=4", "1.0e-06", "50.0%", "FAIL", "has [shape]"):
        assert part in text


def test_export_report(report):
    export = ExportReport(
        path=Path("out/[m].onnx"),
        files=(Path("out/[m].onnx"), Path("out/[m].onnx.data")),
        bytes_written=3 * 2**20,
        opset=20,
        inputs={"x": ("batch", 4)},
        outputs={"y": ("batch", 2)},
        parameters={"w": ("w", "tied")},
        provenance={"adapter_sha256": "abc"},
        seconds={"graph": 1.2345},
        validation=report,
    )
    found = json.loads(export.to_json())
    assert found["inputs"] == {"x": ["batch", 4]}
    assert found["parameters"] == {"w": ["w", "tied"]}
    assert found["seconds"] == {"graph": 1.234}
    assert found["validation"] == json.loads(report.to_json())
    text = rendered(export)
    for part in ("out/[m].onnx.data", "3.0 MiB", "x [batch, 4]", "abc", "FAIL"):
        assert part in text
    bare = ExportReport(
        path=Path("m"),
        files=(),
        bytes_written=0,
        opset=20,
        inputs={},
        outputs={},
        parameters={},
        provenance={},
    )
    assert "not validated" in rendered(bare)
    assert json.loads(bare.to_json())["validation"] is None
