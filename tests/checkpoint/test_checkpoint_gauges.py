"""Saved adapters in another gauge: PEFT runs them with the same outputs, and copies are found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import (
    LoRAPair,
    adapter_digest,
    adapter_points,
    assemble,
    load_adapter,
    read_adapter,
    regauge,
    regauging_report,
    write_adapter,
)
from gauge_ext.checkpoint.gauges import fingerprint
from gauge_ext.errors import AdapterStateError, NonFiniteError
from gauge_ext.geometry import GAUGES, GaugeName
from gauge_ext.models import attach, lora_layers

FIELDS = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "dense"]}
MakePeft = Callable[..., Path]


def run_in_peft(base: nn.Module, folder: Path, token_ids: Tensor) -> Tensor:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        return model(token_ids).last_hidden_state


def test_peft_outputs_are_unchanged_by_every_gauge(
    bert: nn.Module, make_peft_adapter: MakePeft, token_ids: Tensor, tmp_path: Path
) -> None:
    folder = make_peft_adapter(bert, rank_pattern={"query": 2}, **FIELDS)
    with torch.no_grad():
        bare = bert(token_ids).last_hidden_state
    expected = run_in_peft(bert, folder, token_ids)
    effect = (expected - bare).norm()
    assert effect > 0.1 * bare.norm()
    before = read_adapter(folder)
    for gauge in GAUGES:
        after = regauge(folder, gauge)
        write_adapter(after.config, after.tensors, tmp_path / gauge)
        found = run_in_peft(bert, tmp_path / gauge, token_ids)
        assert float((found - expected).norm() / effect) < 1e-4, gauge
        assert all(
            not torch.allclose(pair.lora_A, before.tensors[name].lora_A)
            for name, pair in after.tensors.items()
        )


def test_a_regauged_adapter_keeps_its_config_and_has_a_digest_of_its_own(
    bert: nn.Module, make_peft_adapter: MakePeft
) -> None:
    before = read_adapter(make_peft_adapter(bert, **FIELDS))
    kept = {name: pair.lora_B.clone() for name, pair in before.tensors.items()}
    after = regauge(before, "balanced")
    assert (after.config, after.raw_config, after.path) == (
        before.config,
        before.raw_config,
        before.path,
    )
    assert after.sha256 == adapter_digest(after.config, after.tensors) != before.sha256
    assert all(torch.equal(before.tensors[name].lora_B, b) for name, b in kept.items())
    scaling = 6 / math.sqrt(4)
    for pair in after.tensors.values():
        assert pair.lora_A.dtype == torch.float32
        b = scaling * pair.lora_B.double()
        torch.testing.assert_close(
            b.mT @ b, pair.lora_A.double() @ pair.lora_A.double().mT, rtol=1e-5, atol=1e-6
        )


def test_the_report_says_what_changed(bert: nn.Module, make_peft_adapter: MakePeft) -> None:
    before = read_adapter(make_peft_adapter(bert, **FIELDS))
    after = regauge(before, "equal_energy")
    report = regauging_report(before, after)
    assert [layer.name for layer in report] == list(before.tensors)
    for layer in report:
        one, two = before.tensors[layer.name], after.tensors[layer.name]
        x, y = (p.lora_B.double() @ p.lora_A.double() for p in (one, two))
        assert layer.rank == 4
        assert layer.change == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
        assert 0 < layer.change < 1e-6
        energy = (one.lora_B.double().square().sum(0) * one.lora_A.double().square().sum(1)).sum()
        nuclear = torch.linalg.matrix_norm(x, "nuc")
        assert layer.factor_before == pytest.approx(float(4 * energy / nuclear**2))
        assert layer.factor_after == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("gauge", GAUGES)
def test_an_update_of_zeros_keeps_its_lora_A(gauge: GaugeName) -> None:
    g = torch.Generator().manual_seed(3)
    a = torch.randn(4, 10, generator=g)
    checkpoint = assemble({"a.fresh": LoRAPair(a, torch.zeros(8, 4))}, scaling=2.0)
    after = regauge(checkpoint, gauge)
    assert torch.equal(after.tensors["a.fresh"].lora_A, a)
    (layer,) = regauging_report(checkpoint, after)
    assert (layer.change, layer.factor_before, layer.factor_after) == (0.0, 1.0, 1.0)
    assert after.sha256 == checkpoint.sha256


@pytest.mark.parametrize("gauge", GAUGES)
def test_an_adapter_switched_off_by_its_scaling_stays_as_it_is(gauge: GaugeName) -> None:
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(4, 10, generator=g), torch.randn(8, 4, generator=g)
    pair = regauge(assemble({"a.off": LoRAPair(a, b)}, scaling=0.0), gauge).tensors["a.off"]
    assert torch.equal(pair.lora_A, a)
    assert torch.equal(pair.lora_B, b)


def test_a_lower_rank_is_gauged_in_a_saved_adapter() -> None:
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 10, generator=g), torch.randn(8, 4, generator=g)
    a[3] = a[0]
    checkpoint = assemble({"a.low": LoRAPair(a, b)}, scaling=0.5)
    pair = regauge(checkpoint, "svd").tensors["a.low"]
    assert not bool(pair.lora_A[3].any() or pair.lora_B[:, 3].any())
    torch.testing.assert_close(pair.lora_B @ pair.lora_A, b @ a)


def test_models_are_regauged_in_place(mlp: nn.Module) -> None:
    model = attach(mlp, LoRAConfig(rank=2))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    before = {name: layer.lora_A.detach().clone() for name, layer in lora_layers(model).items()}
    gauges = regauge(model, "left")
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.lora_A, (gauges[name] @ before[name].double()).float())


def test_copies_of_an_adapter_are_found_in_whatever_form_they_are_kept(
    bert: nn.Module, make_peft_adapter: MakePeft, tmp_path: Path
) -> None:
    folder = make_peft_adapter(bert, **FIELDS)
    one = fingerprint(folder)
    assert fingerprint(load_adapter(copy.deepcopy(bert), folder)).key == one.key
    for gauge in GAUGES:
        after = regauge(folder, gauge)
        write_adapter(after.config, after.tensors, tmp_path / gauge)
        other = fingerprint(tmp_path / gauge)
        assert other.distance(one) < 1e-5
        assert other.key == one.key
    half = {
        name: LoRAPair(pair.lora_A.bfloat16(), pair.lora_B.bfloat16())
        for name, pair in read_adapter(folder).tensors.items()
    }
    assert fingerprint(assemble(half, scaling=3.0)).distance(one) < 1e-2
    assert fingerprint(assemble(half, scaling=6.0)).distance(one) == pytest.approx(0.5, abs=1e-2)
    assert fingerprint(folder, size=4).size == 4
    another = fingerprint(make_peft_adapter(bert, name="other", **FIELDS))
    assert abs(another.cosine(one)) < 0.2
    assert another.distance(one) > 1


def test_effective_factors_hold_the_scaling() -> None:
    pair = LoRAPair(torch.ones(2, 5), torch.ones(3, 2))
    points = adapter_points(assemble({"x.y": pair}, scaling=-0.5))
    assert points["x.y"].B.tolist() == (-0.5 * torch.ones(3, 2)).tolist()
    assert points["x.y"].dtype == torch.float64


def test_what_has_no_gauge_is_refused_by_name(mlp: nn.Module) -> None:
    pair = LoRAPair(torch.full((2, 5), math.inf), torch.ones(3, 2))
    with pytest.raises(NonFiniteError, match=r"x\.y: the factors hold NaN or infinity"):
        regauge(assemble({"x.y": pair}), "svd")
    for function in (adapter_points, fingerprint, lambda model: regauge(model, "svd")):
        with pytest.raises(AdapterStateError, match="no adapters are attached"):
            function(mlp)
