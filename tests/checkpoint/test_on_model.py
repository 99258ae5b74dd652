"""One of several adapters on a model: hashed, regauged, exported; refused where none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext import LoRAConfig
from gauge_ext.checkpoint import adapter_sha256, read_adapter, regauge
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import regauge_model, set_adapters
from gauge_ext.models.starting import start_from_inputs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture
def model() -> Model:
    found = Model().double()
    gauge_ext.attach(found, LoRAConfig(rank=2, alpha=4, target_modules=["up"]), "first")
    gauge_ext.attach(found, LoRAConfig(rank=3, alpha=6, target_modules=["up", "down"]), "second")
    with torch.no_grad():
        for parameter in gauge_ext.adapter_parameters(found):
            parameter.normal_(std=0.5)
    return found


def test_the_digest_is_that_of_the_folder(model: Model, tmp_path: Path) -> None:
    for name in ("first", "second"):
        gauge_ext.save_adapter(model, tmp_path / name, name=name)
        assert adapter_sha256(model, name) == read_adapter(tmp_path / name).sha256
    assert adapter_sha256(model) == adapter_sha256(model, "first")  # which alone is active
    set_adapters(model, ["first", "second"])
    with pytest.raises(AdapterStateError, match="not said which is to be hashed"):
        adapter_sha256(model)


def test_one_adapter_is_regauged(model: Model) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    first = [p.detach().clone() for p in (model.up.lora_A, model.up.lora_B)]
    set_adapters(model, ["first", "second"])
    before = model(x).detach()
    with pytest.raises(AdapterStateError, match="to be regauged"):
        regauge(model, "balanced")
    second = model.up.adapter("second")
    old = second.lora_A.detach().clone()
    gauges = regauge_model(model, "balanced", "second")
    assert set(gauges) == {"up", "down"}
    torch.testing.assert_close(second.lora_A, gauges["up"] @ old)
    assert not torch.allclose(second.lora_A, old, atol=0.01)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.up.lora_A, first[0])
    assert torch.equal(model.up.lora_B, first[1])


def test_a_start_from_data_takes_one(model: Model) -> None:
    with torch.no_grad():
        for slot in (model.up, model.down, model.up.adapter("second")):
            slot.lora_B.zero_()
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(
        AdapterStateError, match="takes a model with one adapter.*'first', 'second'"
    ):
        start_from_inputs(model, [x], lambda m, batch: m(batch))


def test_a_merged_file_names_those_that_work(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from gauge_ext.export import export_onnx
    from gauge_ext.export.metadata import provenance

    set_adapters(model, {"first": 0.5, "second": 1.0})
    model.float().eval()
    said = provenance(model)
    assert said["adapter_sha256"] == "+".join(adapter_sha256(model, n) for n in ("first", "second"))
    assert json.loads(said["adapted_layers"]) == {
        "up": {"rank": [2, 3], "scaling": [1.0, 2.0]},
        "down": {"rank": [3], "scaling": [2.0]},
    }
    export_onnx(model, (torch.randn(2, 6),), tmp_path / "m.onnx")
    with pytest.raises(AdapterStateError, match="mode='adapters' takes a model with one adapter"):
        export_onnx(model, (torch.randn(2, 6),), tmp_path / "a.onnx", mode="adapters")
    assert not (tmp_path / "a.onnx").exists()
