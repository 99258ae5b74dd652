"""Bad adapters, which every command that reads one must refuse in the same way."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
Factors = dict[str, tuple[Tensor, Tensor]]
MakeAdapter = Callable[..., tuple[Path, Factors]]
Refused = Callable[..., list[str]]


@pytest.fixture
def refused(fails: Fails, bert_folder: Path, tmp_path: Path) -> Refused:
    """Give the adapter to each command, see it fail and write nothing; return what they said."""

    def check(adapter: Path, *, alone: bool = True) -> list[str]:
        """``alone`` says that the adapter is bad without a base, so inspect refuses it too."""
        before = sorted(tmp_path.rglob("*"))
        said = [
            fails(
                "--adapter", "export", bert_folder, "--adapter", adapter, "--out", tmp_path / "o"
            ),
            fails("--adapter", "merge", bert_folder, "--adapter", adapter, "--out", tmp_path / "o"),
        ]
        onnx = bert_folder / "config.json"  # the adapter is read before the file
        said.append(
            fails("--adapter", "validate", onnx, "--against", bert_folder, "--adapter", adapter)
        )
        if alone:
            said.append(fails("DIR", "inspect", adapter))
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return check


def test_a_missing_folder(refused: Refused, tmp_path: Path) -> None:
    for said in refused(tmp_path / "nowhere"):
        assert "nowhere" in said


def test_a_folder_that_is_no_adapter(refused: Refused, bert_folder: Path) -> None:
    for said in refused(bert_folder):
        assert "adapter_config.json" in said


def test_missing_weights(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert")
    (adapter / "adapter_model.safetensors").unlink()
    for said in refused(adapter):
        assert "adapter_model.safetensors" in said


def test_truncated_weights(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for said in refused(adapter):
        assert "adapter_model.safetensors" in said


def test_a_config_that_is_no_json(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert")
    (adapter / "adapter_config.json").write_text("{")
    for said in refused(adapter):
        assert "adapter_config.json" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("r", 0),
    ],
)
def test_a_config_field_that_is_not_supported(
    field: str, value: Any, refused: Refused, make_adapter: MakeAdapter
) -> None:
    adapter, _ = make_adapter("bert", config={field: value})
    for said in refused(adapter):
        assert field in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(
    value: float, refused: Refused, make_adapter: MakeAdapter
) -> None:
    name = "encoder.layer.1.attention.self.value"

    def spoil(factors: Factors) -> None:
        factors[name][1][2, 1] = value

    adapter, _ = make_adapter("bert", spoil=spoil)
    for said in refused(adapter):
        assert name in said


def test_a_rank_that_the_config_does_not_say(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert", config={"r": 5})
    for said in refused(adapter):
        assert "3" in said
        assert "5" in said


def test_a_shape_that_the_base_does_not_have(refused: Refused, make_adapter: MakeAdapter) -> None:
    name = "encoder.layer.0.attention.self.query"

    def spoil(factors: Factors) -> None:
        factors[name] = (torch.ones(3, 20), torch.ones(16, 3))

    adapter, _ = make_adapter("bert", spoil=spoil)
    for said in refused(adapter, alone=False):
        assert name in said
        assert "20" in said
        assert "16" in said


def test_an_adapter_for_another_model(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter(
        "bert",
        shapes={"model.layers.0.self_attn.q_proj": (16, 16)},
        config={"target_modules": ["q_proj"]},
    )
    for said in refused(adapter, alone=False):
        assert "model.layers.0.self_attn.q_proj" in said


def test_an_adapter_for_another_class_of_this_model(
    bert_folder: Path, make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    adapter, _ = make_adapter(
        "bert", shapes={"bert.encoder.layer.0.attention.self.query": (16, 16)}
    )
    out = tmp_path / "m.onnx"
    said = fails("--adapter", "export", bert_folder, "--adapter", adapter, "--out", out)
    assert "was loaded as BertModel; --architecture" in said


def test_a_pickle_is_refused(refused: Refused, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for said in refused(adapter):
        assert "adapter_model.bin" in said


def test_the_adapter_given_as_base(fails: Fails, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter, _ = make_adapter("bert")
    said = fails("BASE", "export", adapter, "--adapter", adapter, "--out", tmp_path / "m.onnx")
    assert "It is an adapter" in said


def test_an_unknown_config_field_is_a_warning(run: Run, make_adapter: MakeAdapter) -> None:
    adapter, _ = make_adapter("bert", config={"eva_config": None, "from_the_future": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # pytest is told to make errors of them
        result = run("inspect", adapter, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: ")
    assert "from_the_future" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert json.loads(result.stdout)["totals"]["layers"] == 6
