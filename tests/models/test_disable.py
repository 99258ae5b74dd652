"""Adapters switched off for a while, on every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.models import adapter_parameters, attach, merge, unmerge
from gauge_ext.models.working import disable_adapters


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


# Of DoRA without those that cannot have it: grouped convolutions and attention.
@pytest.mark.parametrize(
    ("kind", "use_dora"),
    [
        *((kind, False) for kind in ("linear", "conv", "embedding", "attention")),
        *((kind, True) for kind in ("linear", "embedding")),
    ],
)
def test_the_base_alone_whatever_the_layers(kind: str, use_dora: bool) -> None:
    torch.manual_seed(0)
    layer: nn.Module
    if kind == "linear":
        layer, inputs = nn.Linear(6, 6), (torch.randn(3, 6).double(),)
    elif kind == "conv":
        layer, inputs = nn.Conv1d(6, 4, 3, groups=2), (torch.randn(2, 6, 9).double(),)
    elif kind == "embedding":
        layer, inputs = nn.Embedding(7, 6), (torch.arange(7),)
    else:
        layer, inputs = nn.MultiheadAttention(6, 2), (torch.randn(3, 2, 6).double(),) * 3
    model = nn.ModuleDict({"layer": layer}).double().eval()

    def run() -> torch.Tensor:
        y = model["layer"](*inputs)
        return y[0] if isinstance(y, tuple) else y

    before = run()
    attach(model, LoRAConfig(rank=2, alpha=4, target_modules=["layer"], use_dora=use_dora))
    randomize(model)
    adapted = run()
    assert not torch.allclose(adapted, before)
    with disable_adapters(model):
        torch.testing.assert_close(run(), before)
        with disable_adapters(model):
            torch.testing.assert_close(run(), before)
        torch.testing.assert_close(run(), before)
        merge(model)  # asked for in the middle of it, it stays
    torch.testing.assert_close(run(), adapted)
    unmerge(model)
    torch.testing.assert_close(run(), adapted)


def test_the_base_alone_of_experts_and_tokens() -> None:
    torch.manual_seed(0)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.experts = nn.Parameter(torch.randn(2, 5, 6))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ni,eoi->neo", self.table(ids), self.experts)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Experts()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids)

    model, ids = Model().double(), torch.arange(7)
    before = model(ids)
    config = LoRAConfig(
        rank=2,
        target_modules=[],
        target_parameters=["inner.experts"],
        trainable_token_indices={"table": [1, 4]},
    )
    attach(model, config)
    randomize(model)
    adapted = model(ids)
    assert not torch.allclose(adapted[1], before[1])
    with disable_adapters(model):
        torch.testing.assert_close(model(ids), before)
        merge(model)
    torch.testing.assert_close(model(ids), adapted)
