"""Files that were not made here, made wrong, or made for another model."""

from __future__ import annotations

import threading
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export import Tolerance, validate_onnx


def write_linear(path: Path, model: nn.Linear, rows: str | int = "batch", **spoil: float) -> Path:
    """y = x Wᵀ + b, written with onnx alone."""
    rows_out = spoil.pop("rows_out", rows)
    weight, bias = (p.detach().numpy() for p in (model.weight, model.bias))
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, **spoil)
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, model.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows_out, model.out_features])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(4, 3)


def test_a_file_of_someone_elses(linear, tmp_path):
    path = write_linear(tmp_path / "m.onnx", linear)
    told: list[float] = []
    report = validate_onnx(
        str(path),
        linear.train(),
        (torch.randn(2, 4),),
        random_cases=4,
        progress=lambda what, share: told.append(share),
    )
    assert report.passed
    assert report.path == path
    assert report.runtime.startswith("onnxruntime ")
    assert len(report.cases) == 7
    assert {case.sizes["batch"] for case in report.cases} >= {1, 2, 4}
    assert linear.training
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_unmerged_adapters_are_what_is_expected(linear, adapted, tmp_path):
    merged = nn.Linear(4, 3)
    model = nn.Sequential(linear)
    adapted(model, rank=2, alpha=6.0)
    with torch.no_grad():
        merged.weight.copy_(linear.weight + 3.0 * linear.lora_B @ linear.lora_A)
        merged.bias.copy_(linear.bias)
    x = {"input": torch.randn(2, 4)}
    good = write_linear(tmp_path / "good.onnx", merged)
    assert validate_onnx(good, model, x).passed
    base = nn.Linear(4, 3)
    base.load_state_dict({"weight": linear.weight, "bias": linear.bias})
    forgotten = write_linear(tmp_path / "forgotten.onnx", base)
    report = validate_onnx(forgotten, model, x)
    assert not any(case.passed for case in report.cases)
    assert report.max_abs > 0.1


def test_a_wrong_file_fails_without_raising(linear, tmp_path):
    path = write_linear(tmp_path / "m.onnx", linear, alpha=1.001)
    report = validate_onnx(path, linear, (torch.randn(2, 4),))
    assert not report.passed
    assert "max abs" in report.failures[0]
    assert validate_onnx(
        path, linear, (torch.randn(2, 4),), tolerance=Tolerance.within(0.01)
    ).passed


def test_a_baked_batch_size_is_found(linear, tmp_path):
    """Right on the example, and only there: the table of offsets has the example's rows."""
    path = write_linear(tmp_path / "m.onnx", linear)
    model = onnx.load(path)
    rows = numpy_helper.from_array(torch.zeros(2, 3).numpy(), "rows")
    model.graph.initializer.append(rows)
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(helper.make_node("Add", ["h", "rows"], ["y"]))
    onnx.save(model, path)
    report = validate_onnx(path, linear, (torch.randn(2, 4),))
    verdicts = {case.name: case.passed for case in report.cases}
    assert verdicts["example"]
    assert not verdicts["smallest"]
    assert not verdicts["larger"]
    larger = report.cases[2]
    assert larger.error is not None
    assert any("onnxruntime refused to run" in line for line in report.failures)


class Refusal(Exception):
    """Of nobody's family, as onnxruntime's own exceptions are."""


def test_what_a_runtime_raises_fails_the_case_and_is_shown(linear, tmp_path):
    class Fails:
        name = "somebody's runtime 1.0"
        seconds = None

        def run(self, outputs, feeds):
            if len(feeds["x"]) == 1:
                raise Refusal("one row is too few")
            return [linear(torch.from_numpy(feeds["x"])).detach().numpy()]

    path = write_linear(tmp_path / "m.onnx", linear)
    report = validate_onnx(path, linear, (torch.randn(2, 4),), random_cases=0, runtime=Fails())
    assert {case.name: case.error for case in report.cases} == {
        "example": None,
        "smallest": "one row is too few",
        "larger": None,
    }
    assert not report.passed
    (line,) = report.failures
    assert "one row is too few" in line


def test_what_the_model_itself_raises_is_shown(linear, tmp_path):
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise Refusal("not today")

    path = write_linear(tmp_path / "m.onnx", linear)
    with pytest.raises(ConfigError, match=r"case 'example'.*: Refusal: not today") as caught:
        validate_onnx(path, Fails(4, 3), (torch.randn(2, 4),))
    assert isinstance(caught.value.__cause__, Refusal)


def test_the_narrowest_dtype_sets_the_bar(tmp_path):
    class Mixed(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.half()).float()

    linear = nn.Linear(4, 3)
    path = write_linear(tmp_path / "m.onnx", linear)
    report = validate_onnx(path, Mixed(linear.half()), (torch.randn(2, 4),))
    assert report.passed
    assert report.max_abs > 1e-5
    usual = Tolerance.for_dtype(torch.float16)
    assert report.cases[0].outputs[0].limit > usual.absolute


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 5),), r"input 'x' has shape \['batch', 4\], the example's .* \(2, 5\)"),
        ((torch.randn(2, 4), torch.randn(1)), r"1 inputs \(x\), the example has 2 tensors"),
    ],
)
def test_examples_that_do_not_fit_the_file(linear, inputs, message, tmp_path):
    class Lenient(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return a

    path = write_linear(tmp_path / "m.onnx", linear)
    with pytest.raises(ConfigError, match=message):
        validate_onnx(path, Lenient(), inputs)


def test_a_model_with_other_outputs(linear, tmp_path):
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    path = write_linear(tmp_path / "m.onnx", linear)
    with pytest.raises(ConfigError, match=r"1 outputs \(y\), the model returns 2"):
        validate_onnx(path, Twice(), (torch.randn(2, 4),))


def test_files_that_are_no_graphs(linear, tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        validate_onnx(tmp_path / "m.onnx", linear, (torch.randn(2, 4),))
    (tmp_path / "m.onnx").write_text("not a graph")
    with pytest.raises(ExportError, match=r"cannot load m\.onnx: .*parsing failed") as caught:
        validate_onnx(tmp_path / "m.onnx", linear, (torch.randn(2, 4),))
    assert str(tmp_path) not in str(caught.value)


def test_a_model_that_cannot_be_copied(linear, tmp_path):
    path = write_linear(tmp_path / "m.onnx", linear)
    linear.lock = threading.Lock()
    with pytest.raises(ConfigError, match="this Linear cannot be copied"):
        validate_onnx(path, linear, (torch.randn(2, 4),))


def test_a_compiled_model(linear, tmp_path):
    path = write_linear(tmp_path / "m.onnx", linear)
    assert validate_onnx(path, torch.compile(linear), {"input": torch.randn(2, 4)}).passed


def test_a_truncated_file(linear, tmp_path):
    path = write_linear(tmp_path / "m.onnx", linear)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExportError, match="cannot load"):
        validate_onnx(path, linear, (torch.randn(2, 4),))
