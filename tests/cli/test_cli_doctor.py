"""``gauge-ext doctor``: the report, and the exit status that goes with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import Result

import gauge_ext.doctor

Run = Callable[..., Result]


@pytest.mark.parametrize("healthy", [True, False])
def test_the_exit_status_is_the_verdict(
    healthy: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    info: dict[str, Any] = gauge_ext.doctor.collect() | {"healthy": healthy}
    monkeypatch.setattr(gauge_ext.doctor, "collect", lambda: info)
    table = run("doctor")
    assert table.exit_code == (0 if healthy else 1)
    assert str(torch.__version__) in table.stdout
    as_json = run("doctor", "--json")
    assert as_json.exit_code == table.exit_code
    assert json.loads(as_json.stdout) == json.loads(json.dumps(info))
