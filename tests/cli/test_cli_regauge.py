"""``gauge-ext regauge``: other factors, the same update, and nothing written on a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import Result

from gauge_ext.cli.regauge import GaugeChoice
from gauge_ext.geometry import GaugeName

Run = Callable[..., Result]
Fails = Callable[..., str]
MakeAdapter = Callable[..., tuple[Path, dict[str, tuple[Tensor, Tensor]]]]


def test_every_gauge_can_be_chosen() -> None:
    assert tuple(GaugeChoice) == get_args(GaugeName)


@pytest.mark.parametrize("gauge", get_args(GaugeName))
def test_other_factors_and_the_same_updates(
    make_adapter: MakeAdapter, run: Run, tmp_path: Path, gauge: str
) -> None:
    adapter, factors = make_adapter("tiny")
    out = tmp_path / "out"
    result = run("regauge", adapter, "--gauge", gauge, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"2 layers in the gauge {gauge}" in result.stdout
    assert "largest change of an update by rounding: " in result.stdout
    found = load_file(out / "adapter_model.safetensors")
    for name, (a, b) in factors.items():
        new_a, new_b = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert new_a.shape == a.shape
        assert not torch.allclose(new_a, a)
        torch.testing.assert_close(new_b.double() @ new_a.double(), b.double() @ a.double())
    old, new = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, out)
    )
    assert {name: new[name] for name in old} == old


def test_json_and_in_place(make_adapter: MakeAdapter, run: Run) -> None:
    adapter, factors = make_adapter("tiny")
    result = run("regauge", adapter, "--gauge", "equal_energy", "--out", adapter, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["path"], report["gauge"]) == (str(adapter), "equal_energy")
    assert [layer["name"] for layer in report["layers"]] == sorted(factors)
    for layer in report["layers"]:
        assert layer["rank"] == 3
        assert 0 < layer["change"] < 1e-6
        assert layer["quantisation_factor_before"] > 1.001
        assert layer["quantisation_factor_after"] == pytest.approx(1.0, abs=1e-5)
    inspected = json.loads(run("inspect", adapter, "--json").stdout)
    assert inspected["sha256"] == report["sha256"]


def test_failures_name_the_option_and_write_nothing(
    tiny: Path, fails: Fails, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("regauge", tiny, "--gauge", "svd", "--out")
    assert "is a file" in fails("--out", *arguments, tiny / "adapter_config.json")
    said = fails("DIR", "regauge", tmp_path / "gone", "--gauge", "svd", "--out", out)
    assert "does not exist" in said
    assert run("regauge", tiny, "--gauge", "qr", "--out", out).exit_code == 2
    assert not out.exists()


def test_overflow_is_blamed_on_the_gauge(
    make_adapter: MakeAdapter, fails: Fails, tmp_path: Path
) -> None:
    def enlarge(factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (a, b) in factors.items():
            factors[name] = ((1000 * a).half(), (1000 * b).half())

    adapter, _ = make_adapter("tiny", spoil=enlarge)
    out = tmp_path / "out"
    said = fails("--gauge", "regauge", adapter, "--gauge", "left", "--out", out)
    assert "exceed the range of torch.float16" in said
    assert '"balanced"' in said
    assert not out.exists()
