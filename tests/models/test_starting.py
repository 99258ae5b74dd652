"""Starts from data, against the decompositions done by hand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, ConfigError
from gauge_ext.models import attach
from gauge_ext.models.starting import (
    start_from_gradients,
    start_from_inputs,
    start_from_residual,
)


def batches() -> list[Tensor]:
    mix = torch.randn(12, 12, dtype=torch.float64)
    return [torch.randn(8, 12, dtype=torch.float64) @ mix for _ in range(3)]


def run(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.fixture
def model(mlp: nn.Module) -> nn.Module:
    return attach(mlp.double(), LoRAConfig(rank=2))


def test_eva_takes_the_directions_of_the_inputs(model: nn.Module) -> None:
    data = batches()
    expected = model(data[0]).detach()
    shares = start_from_inputs(model, data, run)
    _, s, vh = torch.linalg.svd(torch.cat(data), full_matrices=False)
    a = model.up.lora_A.detach()
    torch.testing.assert_close(a.T @ a, vh[:2].T @ vh[:2])
    assert shares["up"] == pytest.approx(float(s[:2].square().sum() / s.square().sum()))
    torch.testing.assert_close(model(data[0]), expected)
    assert list(shares) == ["up", "block.down"]


def test_lora_ga_starts_in_the_directions_of_the_gradient(mlp: nn.Module) -> None:
    mlp.double()
    data, plain = batches(), copy.deepcopy(mlp)
    sum(loss(plain, batch) for batch in data).backward()
    u, _, vh = torch.linalg.svd(plain.up.weight.grad, full_matrices=False)
    attach(mlp, LoRAConfig(rank=2))
    before = mlp(data[0]).detach()
    start_from_gradients(mlp, data, loss, gamma=4.0)
    size = 20**0.25 / 2.0
    a, b = mlp.up.lora_A.detach(), mlp.up.lora_B.detach()
    torch.testing.assert_close(a.T @ a, vh[2:4].T @ vh[2:4] * size**2)
    torch.testing.assert_close(b @ b.T, u[:, :2] @ u[:, :2].T * size**2)
    torch.testing.assert_close(mlp(data[0]), before)
    assert not mlp.up.weight.requires_grad


def test_a_residual_is_made_up_for_as_well_as_the_rank_allows(model: nn.Module) -> None:
    wanted = {
        name: layer.weight.detach() + torch.randn_like(layer.weight)
        for name, layer in (("up", model.up), ("block.down", model.block["down"]))
    }
    left = start_from_residual(model, wanted)
    gap = wanted["up"] - model.up.weight
    s = torch.linalg.svdvals(gap)
    assert left["up"] == pytest.approx(float(s[2:].square().sum() / s.square().sum()))
    rest = (gap - model.up.delta_weight()).square().sum() / gap.square().sum()
    assert float(rest) == pytest.approx(left["up"])
    with pytest.raises(AdapterStateError, match="not fresh"):
        start_from_residual(model, wanted)


def test_what_cannot_be_used(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no inputs reached 2 adapted layers, such as 'up'"):
        start_from_inputs(model, [], run)
    with pytest.raises(ConfigError, match="no gradients reached"):
        start_from_gradients(model, [], loss)
    with pytest.raises(ConfigError, match="gamma must be above 0"):
        start_from_gradients(model, [], loss, gamma=0.0)
    with pytest.raises(AdapterMismatchError, match="'up' must have shape"):
        start_from_residual(model, {})
    with pytest.raises(AdapterStateError, match="no adapters on linear layers"):
        start_from_inputs(nn.Linear(2, 2), [], run)


def test_on_a_base_in_four_bits_it_makes_up_for_the_quantization() -> None:
    """LoftQ's start, one step of it: the nearest of the rank to what the bits lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao tells of kernels that its wheel lacks
        quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    wanted = model[0].weight.detach().clone()
    group = quantization.PerGroup(32)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    quantization.quantize_(model, config)
    lost = wanted - model[0].weight.dequantize()
    attach(model, LoRAConfig(rank=8, target_modules=["0"]))
    left = start_from_residual(model, {"0": wanted})
    s = torch.linalg.svdvals(lost.double())
    share = float(s[8:].square().sum() / s.square().sum())
    assert left["0"] == pytest.approx(share, rel=1e-3)
    x = torch.randn(256, 64)
    exact = x @ wanted.T + model[0].bias
    error = (model(x) - exact).detach().square().sum() / (x @ lost.T).square().sum()
    assert 0.8 * share < float(error) < 1.2 * share
