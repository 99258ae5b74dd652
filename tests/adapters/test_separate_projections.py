"""Attention whose key and value have sizes of their own: adapters on its three weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gauge_ext
from gauge_ext import LoRAConfig
from gauge_ext.errors import TargetError
from gauge_ext.models import merged_copy

NAMES = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
CONFIG = LoRAConfig(
    rank=2, alpha=6, target_modules=[], target_parameters=[f"attention.{name}" for name in NAMES]
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, size, width).double() for size, width in ((3, 8), (4, 6), (4, 5)))


def adapted() -> tuple[Model, Model]:
    """A model with random adapters, and its base with ``W + s B A`` put in by hand."""
    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    gauge_ext.attach(model, CONFIG)
    with torch.no_grad():
        for name in NAMES:
            adapter = getattr(model.attention, f"lora_{name}")
            adapter.lora_A.normal_()
            adapter.lora_B.normal_()
            getattr(twin.attention, name).add_(3.0 * adapter.lora_B @ adapter.lora_A)
    return model, twin


@pytest.mark.parametrize("training", [True, False])
def test_each_update_once(training: bool) -> None:
    model, twin = adapted()
    expected = twin.train(training)(*inputs())
    torch.testing.assert_close(model.train(training)(*inputs()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(*inputs()), expected.detach())
    torch.testing.assert_close(merged_copy(model)(*inputs()), expected)
    model(*inputs()).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"attention.lora_{n}.lora_{f}" for n in NAMES for f in "AB"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, twin = adapted()
    gauge_ext.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = gauge_ext.load_adapter(Model().double(), tmp_path / "adapter")
    torch.testing.assert_close(fresh(*inputs()), twin(*inputs()))


def test_what_nothing_would_read_is_refused() -> None:
    with pytest.raises(TargetError, match="q_proj_weight"):
        gauge_ext.attach(Model(), LoRAConfig(rank=2, target_modules=["attention"]))
    config = LoRAConfig(rank=2, target_modules=[], target_parameters=["attention.out_proj.weight"])
    with pytest.raises(TargetError, match="reads it from outside"):
        gauge_ext.attach(Model(), config)
