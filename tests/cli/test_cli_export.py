"""``gauge-ext export``: what it writes against weights merged by hand, and every way to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
SmallFiles = Callable[[int], AbstractContextManager[None]]
Delta = Callable[[tuple[Tensor, Tensor]], Tensor]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]

EXAMPLE = torch.linspace(-1, 1, 18).reshape(3, 6)


def by_hand(factors: dict[str, tuple[Tensor, Tensor]], delta: Delta, x: Tensor) -> Tensor:
    """The tiny model's output with W + s B A, from its definition."""
    torch.manual_seed(7)
    first, second = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)
    hidden = torch.tanh(x @ (first.weight + delta(factors["first"])).T + first.bias)
    return (hidden @ (second.weight + delta(factors["second"])).T + second.bias).detach()


def onnx_output(path: Path, feeds: dict[str, Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})[0]


def test_a_transformers_folder(
    exported_bert: Path, bert_source: Path, make_adapter: MakeAdapter, delta: Delta
) -> None:
    from transformers import BertModel

    _, factors = make_adapter("bert")  # the same numbers as the exported one
    model = BertModel.from_pretrained(bert_source).eval()
    for name, pair in factors.items():
        model.get_submodule(name).weight.data += delta(pair)
    generator = torch.Generator().manual_seed(3)
    feeds = {
        "input_ids": torch.randint(0, 60, (5, 23), generator=generator),
        "attention_mask": torch.ones(5, 23, dtype=torch.int64),
        "token_type_ids": torch.randint(0, 2, (5, 23), generator=generator),
    }
    feeds["attention_mask"][2, 9:] = 0
    with torch.no_grad():
        expected = model(**feeds).last_hidden_state.numpy()
    np.testing.assert_allclose(onnx_output(exported_bert, feeds), expected, atol=1e-4)


def test_the_report_of_a_transformers_folder(exported_bert: Path) -> None:
    report = json.loads(exported_bert.with_suffix(".json").read_text())
    assert report["validation"]["passed"] is True
    sizes = [case["sizes"] for case in report["validation"]["cases"]]
    assert sizes[0] == {"batch": 3, "sequence": 7}  # --batch 3 --sequence 7
    assert any(size != sizes[0] for size in sizes)
    assert report["opset"] == 18
    assert sorted(path.name for path in exported_bert.parent.iterdir()) == [
        "model.json",
        "model.onnx",
    ]


@pytest.mark.parametrize("factory", ["with_inputs", "with_shapes", "with_tensor"])
def test_a_factory(
    factory: str,
    factory_folder: Path,
    make_adapter: MakeAdapter,
    delta: Delta,
    run: Run,
    tmp_path: Path,
) -> None:
    adapter, factors = make_adapter("tiny")
    out = tmp_path / "new" / "folder" / "tiny.onnx"
    result = run("export", f"tiny_models:{factory}", "--adapter", adapter, "--out", out)
    assert result.exit_code == 0, result.output
    assert "example" in result.stdout
    x = torch.cat([EXAMPLE, 2 * EXAMPLE])  # six rows, where the example has three
    expected = by_hand(factors, delta, x).numpy()
    np.testing.assert_allclose(onnx_output(out, {"x": x}), expected, atol=1e-5)


def test_json_and_nothing_else_on_stdout(
    factory_folder: Path, make_adapter: MakeAdapter, run: Run, tmp_path: Path
) -> None:
    adapter, _ = make_adapter("tiny")
    out = tmp_path / "tiny.onnx"
    arguments = ("export", "tiny_models:chatty", "--adapter", adapter, "--out", out)
    result = run(*arguments, "--json", "--static", "--random-cases", "1", "--external-data")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["validation"]["passed"] is True
    assert list(report["inputs"].values()) == [[3, 6]]  # --static
    assert len(report["files"]) == 2  # --external-data
    assert "chatter on stdout" in result.stderr


def test_an_adapter_that_the_factory_brings(
    factory_folder: Path, run: Run, fails: Fails, tmp_path: Path
) -> None:
    (factory_folder / "adapted_models.py").write_text(
        "import torch, gauge_ext\n"
        "from tiny_models import with_inputs\n"
        "def adapted():\n"
        "    model, inputs = with_inputs()\n"
        "    config = gauge_ext.LoRAConfig(rank=2, target_modules=['first'])\n"
        "    gauge_ext.attach(model, config)\n"
        "    torch.nn.init.normal_(model.first.lora_B)\n"
        "    return model, inputs\n"
    )
    out = tmp_path / "tiny.onnx"
    result = run("export", "adapted_models:adapted", "--out", out, "--no-validate")
    assert result.exit_code == 0, result.output
    assert "1 adapted layer" in result.stderr
    assert "not validated" in result.stdout
    said = fails("--adapter", "export", "tiny_models:with_inputs", "--out", out)
    assert "has no adapter of its own" in said


def test_a_tolerance_that_is_not_met(
    factory_folder: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    adapter, _ = make_adapter("tiny")
    out, report = tmp_path / "tiny.onnx", tmp_path / "report.json"
    out.write_bytes(b"what was here before")
    arguments = ("export", "tiny_models:with_inputs", "--adapter", adapter, "--out", out)
    said = fails("--tolerance", *arguments, "--tolerance", "1e-14", "--report", report, writes=True)
    assert "tolerance" in said
    assert out.read_bytes() == b"what was here before"
    assert json.loads(report.read_text())["passed"] is False
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["report.json", "tiny.onnx"]


@pytest.mark.usefixtures("factory_folder", "unchanged_after_setup")
class TestNothingIsWrittenWhen:
    """One bad input each; no file may be left or changed."""

    @pytest.mark.parametrize(
        ("base", "said"),
        [
            ("no/such/folder", ["no such folder"]),
            ("org/model", ["no such folder", "hf download org/model"]),
            ("tiny_models.py", ["file", "tiny_models:FUNCTION"]),
            ("no_such_module:build", ["no module 'no_such_module'", "PYTHONPATH"]),
            ("tiny_models.deeper:build", ["tiny_models.deeper"]),
            ("broken_import:build", ["importing 'broken_import'", "no_such_dependency"]),
            ("broken_syntax:build", ["importing 'broken_syntax'", "SyntaxError"]),
            ("tiny_models:with_input", ["no 'with_input'", "'with_inputs'"]),
            ("tiny_models:number", ["function without arguments", "int"]),
            ("tiny_models:instance", ["function without arguments", "Tiny"]),
            ("tiny_models:raises", ["raised RuntimeError: no weights today."]),
            ("tiny_models:leaves", ["raised SystemExit"]),
            ("leaves:build", ["importing 'leaves' raised SystemExit"]),
            ("tiny_models:bfloat16", ["bfloat16"]),
            ("tiny_models:needs_an_argument", ["TypeError", "size"]),
            ("tiny_models:returns_text", ["returned str", "torch.nn.Module"]),
            ("tiny_models:Weird", ["returned Weird", "torch.nn.Module"]),
            ("tiny_models:returns_four", ["returned (Tiny, NoneType, NoneType, NoneType)"]),
            ("tiny_models:model", ["no example inputs", "(model, example_inputs)"]),
            ("tiny_models:wrong_inputs", ["cannot run on its example inputs", "RuntimeError"]),
            ("tiny_models:odd_inputs", ["example inputs of type str"]),
            ("tiny_models:nan", ["first.weight", "NaN"]),
        ],
    )
    def test_base_is(
        self, base: str, said: list[str], tiny: Path, fails: Fails, tmp_path: Path
    ) -> None:
        message = fails("BASE", "export", base, "--adapter", tiny, "--out", tmp_path / "m.onnx")
        for words in said:
            assert words in message

    def test_torch_cannot_trace_the_model(self, tiny: Path, run: Run, tmp_path: Path) -> None:
        arguments = ("export", "tiny_models:branches", "--adapter", tiny)
        result = run(*arguments, "--out", tmp_path / "m.onnx")
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        # torch prints the part of the graph that it has before the error.
        said = result.stderr.splitlines()[-1]
        assert said.startswith("error: BASE: ")
        assert "Branching" in said

    def test_the_target_is_a_folder(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        assert str(tmp_path) in fails("--out", *arguments, "--out", tmp_path)

    def test_the_target_lies_in_a_file(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        inside = tiny / "adapter_config.json" / "model.onnx"
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        assert "is a file" in fails("--out", *arguments, "--out", inside)

    def test_the_report_cannot_be_written(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        out = tmp_path / "m.onnx"
        assert str(tmp_path) in fails("--report", *arguments, "--out", out, "--report", tmp_path)

    def test_the_disk_is_full(
        self, tiny: Path, fails: Fails, small_files: SmallFiles, tmp_path: Path
    ) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        with small_files(700):
            said = fails("--out", *arguments, "--out", tmp_path / "m.onnx")
        assert "nothing was left" in said

    def test_sizes_are_given_for_inputs_of_the_factory(
        self, tiny: Path, fails: Fails, tmp_path: Path
    ) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        for option in ("--batch", "--sequence"):
            fails(option, *arguments, option, 4, "--out", tmp_path / "m.onnx")

    def test_a_class_is_given_for_a_factory(self, tiny: Path, fails: Fails, tmp_path: Path) -> None:
        arguments = ("export", "tiny_models:with_inputs", "--adapter", tiny)
        out = tmp_path / "m.onnx"
        fails("--architecture", *arguments, "--architecture", "BertModel", "--out", out)


def test_usage_errors_have_status_2(run: Run) -> None:
    for arguments in (
        ("export",),
        ("export", "base"),
        ("export", "base", "--out", "m.onnx", "--opset", "3"),
        ("export", "base", "--out", "m.onnx", "--tolerance", "-1"),
        ("export", "base", "--out", "m.onnx", "--batch", "0"),
        ("export", "base", "--out", "m.onnx", "--no-such-option"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output
