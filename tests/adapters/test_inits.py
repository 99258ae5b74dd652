"""Starts of the factors: nothing changes at first, and the factors are what the papers say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.adapters import AdapterSpec, LoRAConfig, adapt
from gauge_ext.checkpoint import adapter_sha256, load_adapter, read_adapter, save_adapter
from gauge_ext.errors import ConfigError, TargetError
from gauge_ext.models import attach, detach, merge, unmerge

INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"]


def layer(**spec: object) -> tuple[nn.Linear, nn.Module]:
    base = nn.Linear(9, 7).double()
    return base, adapt(copy.deepcopy(base), AdapterSpec(**{"rank": 4, "scaling": 0.5} | spec))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_fresh_adapter_changes_nothing_and_learns(init: str, transposed: bool) -> None:
    base: nn.Module = nn.Linear(9, 7)
    if transposed:
        base = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 9)
    base.double()
    weight = base.weight
    twin = adapt(copy.deepcopy(base), AdapterSpec(rank=4, scaling=0.5, init=init, dropout=0.2))
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(twin.train()(x), base(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.delta_weight(), torch.zeros_like(weight), rtol=0, atol=1e-12)
    assert torch.equal(twin.weight, weight)
    twin(x).square().sum().backward()
    assert max(float(p.grad.abs().max()) for p in (twin.lora_A, twin.lora_B)) > 0


def test_pissa_holds_the_largest_singular_triples() -> None:
    base, exact = layer(init="pissa")
    u, s, vh = torch.linalg.svd(base.weight.detach())
    expected = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    torch.testing.assert_close(0.5 * exact.lora_B @ exact.lora_A, expected)
    assert torch.allclose(exact.lora_B.T @ exact.lora_B, exact.lora_A @ exact.lora_A.T)
    _, fast = layer(init="pissa_niter_8")
    fast.weight = exact.weight
    torch.manual_seed(0)
    again = adapt(copy.deepcopy(base), AdapterSpec(rank=4, scaling=0.5, init="pissa_niter_8"))
    torch.testing.assert_close(0.5 * again.lora_B @ again.lora_A, expected, rtol=1e-3, atol=1e-3)


def test_olora_holds_the_first_columns_of_q() -> None:
    base, olora = layer(init="olora")
    q, r = torch.linalg.qr(base.weight.detach())
    torch.testing.assert_close(olora.lora_B.detach(), q[:, :4])
    torch.testing.assert_close(olora.lora_A.detach(), r[:4])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_start_is_saved_as_an_update_of_twice_the_rank(
    init: str, use_rslora: bool, mlp: nn.Module, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base, x = copy.deepcopy(mlp), torch.randn(4, 12)
    attach(mlp, LoRAConfig(rank=3, alpha=2, init=init, use_rslora=use_rslora))
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    for _ in range(3):
        optimizer = torch.optim.SGD(gauge_ext.adapter_parameters(mlp), 0.1)
        mlp(x).square().sum().backward()
        optimizer.step()
    constant = [name for name, p in mlp.named_parameters() if torch.equal(p, before[name])]
    assert {name.rpartition(".")[2] for name in constant} == {
        "weight",
        "bias",
        "lora_A0",
        "lora_B0",
    }
    expected = mlp(x).detach()
    assert (expected - base(x)).abs().max() > 1e-3
    save_adapter(mlp, tmp_path)
    checkpoint = read_adapter(tmp_path)
    assert {pair.rank for pair in checkpoint.tensors.values()} == {6}
    assert checkpoint.sha256 == adapter_sha256(mlp)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), expected)
    torch.testing.assert_close(merge(mlp)(x), expected)
    assert torch.equal(detach(unmerge(mlp))(x), base(x))
    assert mlp.state_dict().keys() == base.state_dict().keys()


def test_what_does_not_suit_an_init() -> None:
    with pytest.raises(ConfigError, match="at most min\\(out, in\\) = 7"):
        layer(init="pissa", rank=8)
    with pytest.raises(ConfigError, match="needs an even rank, got 3"):
        layer(init="orthogonal", rank=3)
    with pytest.raises(TargetError, match="init 'olora' is for linear layers"):
        adapt(nn.Embedding(4, 4), AdapterSpec(rank=2, init="olora"))
