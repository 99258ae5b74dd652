from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from gauge_ext.errors import ConfigError, ExportError, NonFiniteError
from gauge_ext.export.checks import require_count, require_exportable, require_packages
from gauge_ext.export.trace.inputs import bind_inputs


def test_a_package_that_is_missing(monkeypatch):
    require_packages()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ExportError, match=r"onnxruntime is not installed.*gauge-ext\[export\]"):
        require_packages()
    require_packages("onnx")


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_counts(value):
    require_count("n", 0)
    with pytest.raises(ConfigError, match="n must be a count of 0 or more"):
        require_count("n", value)


def test_weights_and_inputs():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    x = bind_inputs(model, (torch.ones(1, 2),))
    require_exportable(model, x)
    with pytest.raises(ExportError, match="1 tensors are bfloat16, the first is 'input'"):
        require_exportable(model, x.with_tensors([torch.ones(1, 2, dtype=torch.bfloat16)]))
    with torch.no_grad():
        model.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight holds NaN or infinity in 2 of 4 entries"):
        require_exportable(model, x)
