"""What survives a merge, against the update and the rounded weights by hand in float64."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError, NonFiniteError, TargetError
from gauge_ext.models import adapter_parameters, attach, is_merged, lora_layers, merge, unmerge
from gauge_ext.models.fidelity import LayerFidelity, merge_fidelity, merge_stochastic
from gauge_ext.models.many import add_adapter
from gauge_ext.models.working import set_adapters


def adapted(dtype: torch.dtype, share: float = 0.005) -> nn.Sequential:
    """Return a model whose updates are about ``share`` of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 64)).to(dtype)
    attach(model, LoRAConfig(rank=4, alpha=4))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B, std=share * layer.base_weight.float().std().item() / 2)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_figures_are_those_of_a_merge_by_hand(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    before = {name: layer.base_weight.double() for name, layer in lora_layers(model).items()}
    report = merge_fidelity(model)
    assert not is_merged(model)
    merge(model)
    squares = [0.0, 0.0, 0.0]
    for name, layer in lora_layers(model).items():
        delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        kept = layer.base_weight.double() - before[name]
        found = report.layers[name]
        for i, (norm, matrix) in enumerate(
            ((found.delta, delta), (found.kept, kept), (found.lost, delta - kept))
        ):
            assert norm == pytest.approx(matrix.norm().item(), rel=1e-3)
            squares[i] += matrix.square().sum().item()
        share = ((kept * delta).sum() / delta.square().sum()).item()
        assert found.survival == pytest.approx(share, rel=1e-3)
        assert found.error == pytest.approx(((delta - kept).norm() / delta.norm()).item(), rel=1e-3)
    total = report.total
    norms = [total.delta, total.kept, total.lost]
    assert norms == pytest.approx([math.sqrt(square) for square in squares], rel=1e-3)
    worst = {torch.bfloat16: (0.2, 2.0), torch.float16: (0.02, 0.2), torch.float32: (0.0, 1e-4)}
    low, high = worst[dtype]
    assert low <= total.error <= high


def test_by_chance_the_update_survives_in_expectation() -> None:
    model = adapted(torch.bfloat16, share=0.001)
    nearest = merge_fidelity(model).total
    kept = torch.zeros_like(lora_layers(model)["0"].base_weight, dtype=torch.float64)
    base = lora_layers(model)["0"].base_weight
    before, delta = base.double(), lora_layers(model)["0"].delta_weight().double()
    torch.manual_seed(3)
    rounds = 64
    for _ in range(rounds):
        merge_stochastic(model)
        kept += (lora_layers(model)["0"].base_weight.double() - before) / rounds
        unmerge(model)
    assert lora_layers(model)["0"].base_weight is base
    share = ((kept * delta).sum() / delta.square().sum()).item()
    step = 2.0**-7 * before.abs()  # at most: the distance of two neighbours
    deviation = (step * delta.abs() * delta.square()).sum().sqrt() / delta.square().sum()
    assert abs(share - 1) < 5 * deviation.item() / math.sqrt(rounds)
    assert nearest.error > 0.5


def test_a_seed_makes_it_repeatable() -> None:
    found = []
    for seed in (7, 7, 8):
        model = merge_stochastic(adapted(torch.bfloat16), torch.tensor(seed))
        found.append(lora_layers(model)["2"].base_weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_two_weights_are_rounded_by_the_same_numbers() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    attach(model, LoRAConfig(rank=2, alpha=2))
    for layer in lora_layers(model).values():
        layer.weight.data.fill_(1.0)
        nn.init.constant_(layer.lora_A, 2.0**-5)
        nn.init.constant_(layer.lora_B, 2.0**-5)  # a quarter of the way to the next number
    first, second = (layer.weight for layer in lora_layers(merge_stochastic(model)).values())
    assert 0.2 < (first > 1).float().mean() < 0.3
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [1.0, 0.75], ids=["small", "near the end of the range"])
def test_without_the_base_the_weights_are_the_same(dtype: torch.dtype, largest: float) -> None:
    def model() -> nn.Module:
        found = adapted(dtype)
        if largest < 1.0:  # where a bound does not tell that all is finite
            found[2].weight.data[0, 0] = largest * torch.finfo(dtype).max
        return found

    seed = torch.tensor(5)
    expected = [p.weight for p in lora_layers(merge_stochastic(model(), seed)).values()]
    given = model()
    held = given[0].weight
    bits, place = held.detach().clone(), given[2].weight.data_ptr()
    assert merge_stochastic(given, seed, keep_base=False) is given
    found = [layer.weight for layer in lora_layers(given).values()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(held, bits)  # somebody holds it
    assert found[0] is not held
    assert found[1].data_ptr() == place
    with pytest.raises(AdapterStateError, match="was not kept"):
        unmerge(given)


def test_of_several_adapters_the_active_ones_count() -> None:
    model = adapted(torch.bfloat16)
    add_adapter(model, LoRAConfig(rank=2, alpha=2), "b")
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    set_adapters(model, {"default": 0.5, "b": -1.0})
    for name, layer in lora_layers(model).items():
        delta = layer.delta_weight().norm().item()
        assert merge_fidelity(model).layers[name].delta == pytest.approx(delta, rel=1e-4)
    set_adapters(model, ())
    assert merge_fidelity(model).total == LayerFidelity(torch.bfloat16, 0.0, 0.0, 0.0)
    assert merge_fidelity(model).total.survival == 1.0


def test_the_table_has_every_layer_and_the_total() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(merge_fidelity(adapted(torch.bfloat16)).table())
    text = console.export_text()
    assert all(f"│ {name} " in text for name in ("0", "2", "total"))


def test_what_is_refused() -> None:
    model = adapted(torch.float32)
    with pytest.raises(TargetError, match=r"weight of '0' is torch.float32.*gauge_ext.merge"):
        merge_stochastic(model)
    merge(model)
    with pytest.raises(AdapterStateError, match="merged already"):
        merge_fidelity(model)
    with pytest.raises(AdapterStateError, match="no adapters"):
        merge_fidelity(nn.Sequential(nn.Linear(2, 2)))
    bad = adapted(torch.bfloat16)
    with torch.no_grad():
        lora_layers(bad)["2"].lora_A[0, 0] = float("inf")
    bits = [layer.weight.detach().clone() for layer in lora_layers(bad).values()]
    for keep_base in (True, False):
        with pytest.raises(NonFiniteError, match=r"2: the weight.*Nothing was merged"):
            merge_stochastic(bad, keep_base=keep_base)
        assert not is_merged(bad)
        now = [layer.weight for layer in lora_layers(bad).values()]
        assert all(torch.equal(a, b) for a, b in zip(now, bits, strict=True))


def test_a_start_counts_against_the_update() -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    attach(model, LoRAConfig(rank=4, init="olora"))
    (layer,) = lora_layers(model).values()
    nn.init.normal_(layer.lora_B)
    start = layer.lora_B0.double() @ layer.lora_A0.double()
    delta = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double() - start)
    assert merge_fidelity(model).total.delta == pytest.approx(delta.norm().item(), rel=1e-5)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}])
def test_more_than_two_factors_are_refused(option: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    # What each option takes is not in the type of a dictionary.
    attach(model, LoRAConfig(rank=2, **option))  # type: ignore[arg-type]
    for function in (merge_fidelity, merge_stochastic):
        with pytest.raises(TargetError, match=r"0 has a magnitude \(DoRA\) or a bias"):
            function(model)
