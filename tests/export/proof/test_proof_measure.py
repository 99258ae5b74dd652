from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from gauge_ext.errors import ExportError
from gauge_ext.export import export_onnx
from gauge_ext.export.proof.measure import interleaved, measure_memory


def test_calls_come_in_turns():
    order: list[str] = []
    found, rounds = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0
    )
    assert interleaved({"own clock": lambda: 3.0}, seconds=0.0)[0] == {"own clock": 3.0}
    assert order == ["a", "b"] * (rounds + 1)
    assert rounds == 5
    assert set(found) == {"a", "b"}


def test_the_slower_one_is_slower():
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    found, rounds = interleaved(calls, seconds=0.1)
    assert found["slow"] > found["fast"]
    assert found["slow"] >= 0.01
    assert rounds >= 5


def test_memory_grows_with_the_weights(tmp_path):
    sizes = {}
    for width in (32, 2048):
        path = tmp_path / f"{width}.onnx"
        model = nn.Linear(width, width)
        x = torch.randn(1, width)
        export_onnx(model, (x,), path, validate=False, external_data=width > 32)
        found = measure_memory(path.name, 1, path, {"input": x.numpy()})
        assert found.weights >= 4 * width * width
        assert 0 <= found.load <= found.run
        sizes[width] = found.run
    assert sizes[2048] - sizes[32] > 0.8 * 4 * 2048 * 2048


def test_a_process_that_fails(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"memory of m\.onnx failed"):
        measure_memory("m", 1, path, {"x": np.zeros(1)})
