"""What a bfloat16 merge rounds away as an adapter, against sums and an SVD by hand in float64."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gauge_ext import LoRAConfig, load_adapter, merge_and_unload, merge_with_residual, unmerge
from gauge_ext.errors import AdapterStateError, ConfigError, NonFiniteError, TargetError
from gauge_ext.models import attach, is_merged, lora_layers


def adapted(share: float, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """A model whose updates of rank 4 are about ``share`` of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 48)).to(dtype)
    attach(model, LoRAConfig(rank=4, alpha=4, task_type="CAUSAL_LM"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B, std=share * layer.base_weight.float().std().item() / 2)
    return model


def exact(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """W and D of each layer."""
    return {
        name: (
            layer.base_weight.double(),
            layer.scaling * layer.lora_B.double() @ layer.lora_A.double(),
        )
        for name, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize("share", [1e-3, 1e-2])
@pytest.mark.parametrize("rank", [1, 6])
def test_it_is_the_nearest_of_its_rank_and_the_report_is_true(share: float, rank: int) -> None:
    model = adapted(share)
    wanted = exact(model)
    found = merge_with_residual(model, rank)
    assert is_merged(model)
    squares = [0.0, 0.0, 0.0]
    for name, layer in lora_layers(model).items():
        weight, delta = wanted[name]
        kept = layer.base_weight.double() - weight
        lost = delta - kept
        pair = found.adapter.tensors[name]
        product = pair.lora_B.double() @ pair.lora_A.double()
        assert pair.rank == rank
        best = torch.linalg.svdvals(lost)[rank:].square().sum().sqrt()
        assert (lost - product).norm() <= 1.01 * best
        before, after = found.without.layers[name], found.restored.layers[name]
        assert before.error == pytest.approx((lost.norm() / delta.norm()).item(), rel=1e-9)
        error = (lost - product).norm() / delta.norm()
        assert after.error == pytest.approx(error.item(), rel=1e-9)
        share_kept = ((kept + product) * delta).sum() / delta.square().sum()
        assert after.survival == pytest.approx(share_kept.item(), rel=1e-6)
        for i, part in enumerate((delta, lost, lost - product)):
            squares[i] += part.square().sum().item()
    total = math.sqrt(squares[1] / squares[0]), math.sqrt(squares[2] / squares[0])
    assert (found.without.total.error, found.restored.total.error) == pytest.approx(total)
    assert total[1] < total[0]


def test_of_an_update_below_the_last_bit_most_comes_back() -> None:
    """An update of a ten-thousandth is lost, nearly all; of the rank of the update, nearly all."""
    found = merge_with_residual(adapted(1e-4), 4)
    assert found.without.total.error > 0.8
    assert found.restored.total.survival > 0.8
    # And of one that the weights do hold, what is lost is noise: no small rank has much of it.
    loud = merge_with_residual(adapted(0.1), 4)
    assert loud.restored.total.error > 0.8 * loud.without.total.error


def test_saved_and_put_on_the_merged_model(tmp_path: Path) -> None:
    model = adapted(1e-4)
    x = torch.randn(5, 96).bfloat16()
    wanted = exact(model)
    residual = merge_with_residual(model, 4, keep_base=False)
    with pytest.raises(AdapterStateError, match="was not kept"):
        unmerge(model)
    residual.save(tmp_path)
    merged = merge_and_unload(model)
    weights = [merged[0].weight.double(), merged[2].weight.double()]
    served = load_adapter(merged, tmp_path)
    assert list(lora_layers(served)) == ["0", "2"]
    for weight, layer, (base, delta) in zip(
        weights, lora_layers(served).values(), wanted.values(), strict=True
    ):
        alone = (weight - base - delta).norm()
        assert (weight + layer.delta_weight().double() - base - delta).norm() < 0.6 * alone
    assert served(x).shape == (5, 48)


def test_unmerging_gives_the_old_weights_back() -> None:
    model = adapted(1e-3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    merge_with_residual(model, 2)
    unmerge(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_an_exact_merge_leaves_none(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16())
    attach(model, LoRAConfig(rank=1, alpha=1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].lora_A.fill_(1.0)
        model[0].lora_B.fill_(0.5)
    found = merge_with_residual(model, 2)
    assert found.adapter is None
    assert found.restored.total.error == 0.0
    with pytest.raises(AdapterStateError, match="lost nothing"):
        found.save(tmp_path)


def test_the_table_has_every_layer_and_the_total() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(merge_with_residual(adapted(1e-3), 3).table())
    text = console.export_text()
    assert all(f"│ {name} " in text for name in ("0", "2", "total"))
    assert "with the residual" in text


def test_on_a_failure_nothing_is_changed() -> None:
    model = adapted(1e-3)
    with pytest.raises(ConfigError):
        merge_with_residual(model, 0)
    with torch.no_grad():
        lora_layers(model)["2"].lora_B[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2: lora_B holds NaN"):
        merge_with_residual(model, 2)
    assert not is_merged(model)
    embedding = attach(nn.Sequential(nn.Embedding(4, 4)), LoRAConfig(target_modules=["0"]))
    with pytest.raises(TargetError, match="for nn.Linear layers"):
        merge_with_residual(embedding, 2)
