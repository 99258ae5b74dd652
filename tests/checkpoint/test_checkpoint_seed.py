"""The seed's classes, which hold their base, saved and read like every adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.models import adapters


@pytest.mark.parametrize("kind", [gauge_ext.LoRAGaugeField, gauge_ext.LoRAFiberBundle])
def test_they_are_saved_and_load_onto_the_plain_model(
    kind: type[nn.Module], mlp: nn.Module, make_mlp: type[nn.Module], tmp_path: Path
) -> None:
    plain = make_mlp()
    plain.load_state_dict(mlp.state_dict())
    mlp.up = kind(mlp.up, 3, scaling=0.5)
    mlp.block["down"] = kind(mlp.block["down"], 2, scaling=2.0)
    for parameter in gauge_ext.adapter_parameters(mlp):
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(4, 12)
    assert list(adapters(mlp)) == ["up", "block.down"]
    save_adapter(mlp, tmp_path)
    checkpoint = read_adapter(tmp_path)
    assert {name: pair.rank for name, pair in checkpoint.tensors.items()} == {
        "up": 3,
        "block.down": 2,
    }
    assert {n: checkpoint.config.scaling_for(n) for n in checkpoint.tensors} == {
        "up": 0.5,
        "block.down": 2.0,
    }
    assert checkpoint.sha256 == adapter_sha256(mlp)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), mlp(x))
    assert not torch.allclose(plain(x), gauge_ext.detach(plain)(x))


def test_their_parameters_are_what_an_optimizer_trains(mlp: nn.Module) -> None:
    mlp.up = gauge_ext.LoRAGaugeField(mlp.up, 3)
    names = [name for name, _ in gauge_ext.named_adapter_parameters(mlp)]
    assert names == ["up.gauge_field.A", "up.gauge_field.phi"]
