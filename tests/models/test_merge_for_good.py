"""Merging without the old weights: in the memory of one layer, and all or nothing all the same."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gauge_ext import LoRAGaugeField, _load
from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.errors import AdapterStateError, NonFiniteError
from gauge_ext.models import (
    adapter_parameters,
    attach,
    attached_modules,
    is_merged,
    lora_layers,
    merge,
    merge_and_unload,
)

compiled = pytest.mark.skipif(
    not _load.status().compiled, reason="only the compiled kernel writes into a weight"
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"lora_bias": True},
    {"init": "olora"},
]


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, **fields}))
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_the_weights_are_those_of_a_merge_that_keeps_the_base(
    mlp: nn.Module, dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    adapted(mlp.to(dtype), **fields)
    expected = {n: p.clone() for n, p in merge(copy.deepcopy(mlp)).named_parameters()}
    merge(mlp, keep_base=False)
    assert is_merged(mlp)
    for name, parameter in mlp.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_an_embedding_and_a_convolution_too() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(5, 4, 3))
    adapted(model, target_modules=["0", "1"])
    ids = torch.randint(9, (2, 5))
    before = model(ids)
    plain = merge_and_unload(model)
    assert [type(layer) for layer in plain] == [nn.Embedding, nn.Conv1d]
    torch.testing.assert_close(plain(ids), before, rtol=1e-5, atol=1e-5)


@compiled
def test_a_weight_that_nobody_else_holds_is_written_to(mlp: nn.Module) -> None:
    adapted(mlp)
    place = mlp.up.weight.data_ptr()
    merge(mlp, keep_base=False)
    assert mlp.up.weight.data_ptr() == place


def test_a_weight_that_somebody_holds_is_not(mlp: nn.Module) -> None:
    adapted(mlp)
    held = [mlp.up.weight, mlp.block["down"].weight.detach()]
    bits = [t.clone() for t in held]
    merge_and_unload(mlp)
    assert all(torch.equal(a, b) for a, b in zip(held, bits, strict=True))
    assert not torch.equal(mlp.up.weight, bits[0])


def test_a_tied_embedding_stays(llama: nn.Module, token_ids: Tensor) -> None:
    bits = llama.model.embed_tokens.weight.detach().clone()
    adapted(llama, target_modules=["lm_head", "q_proj"])
    logits = llama(token_ids).logits
    merge_and_unload(llama)
    assert torch.equal(llama.model.embed_tokens.weight, bits)
    torch.testing.assert_close(llama(token_ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_of_the_adapters(bert: nn.Module, token_ids: Tensor) -> None:
    flags = {name: p.requires_grad for name, p in bert.named_parameters()}
    kinds = [type(module) for module in bert.modules()]
    adapted(bert, modules_to_save=["pooler"])
    before = bert(token_ids)
    whole = bert.pooler.dense.weight
    assert merge_and_unload(bert) is bert
    after = bert(token_ids)
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state)
    torch.testing.assert_close(after.pooler_output, before.pooler_output)
    assert bert.pooler.dense.weight is whole
    assert [type(module) for module in bert.modules()] == kinds
    assert {name: p.requires_grad for name, p in bert.named_parameters()} == flags
    assert not attached_modules(bert)


def test_what_is_merged_already_is_unloaded(mlp: nn.Module) -> None:
    adapted(mlp)
    x = torch.randn(3, 12)
    before = mlp(x)
    mlp.up.merge()
    merge_and_unload(mlp)
    assert not lora_layers(mlp)
    torch.testing.assert_close(mlp(x), before)


def test_a_compiled_model_comes_out_of_its_wrapper(mlp: nn.Module) -> None:
    adapted(mlp)
    assert merge_and_unload(torch.compile(mlp, backend="eager")) is mlp


def test_adapters_that_hold_their_base(mlp: nn.Module) -> None:
    x = torch.randn(3, 12)
    mlp.up = LoRAGaugeField(mlp.up, rank=2)
    nn.init.normal_(mlp.up.lora_B)
    adapted(mlp, target_modules=["down"])
    before = mlp(x)
    assert type(merge_and_unload(mlp).up) is nn.Linear
    torch.testing.assert_close(mlp(x), before, rtol=1e-5, atol=1e-5)
    alone = LoRAGaugeField(nn.Linear(4, 4), rank=2)
    assert type(merge_and_unload(alone)) is nn.Linear


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("function", [merge_and_unload, lambda m: merge(m, keep_base=False)])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "weight"])
@pytest.mark.parametrize("fields", OPTIONS[:3], ids=str)
def test_what_is_not_finite_is_found_before_anything_is_written(
    mlp: nn.Module, function: Any, factor: str, fields: dict[str, Any]
) -> None:
    adapted(mlp, **fields)
    with torch.no_grad():
        getattr(mlp.block["down"], factor)[0, 0] = float("nan")
    before = bits_of(mlp)
    with pytest.raises(NonFiniteError, match=rf"block\.down: {factor} holds NaN") as caught:
        function(mlp)
    assert caught.value.hint == "Nothing was merged."
    for name, bits in bits_of(mlp).items():
        torch.testing.assert_close(bits, before[name], rtol=0, atol=0, equal_nan=True)
    assert not is_merged(mlp)
    assert isinstance(mlp.up, LoRALinear)
    assert is_merged(merge(mlp, safe=False, keep_base=False))


def test_a_sum_beyond_the_range_is_found_and_one_below_it_is_not_refused(mlp: nn.Module) -> None:
    adapted(mlp.to(torch.float16))
    layer = mlp.block["down"]
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
        layer.weight.fill_(60000.0)
    before = bits_of(mlp)
    # 60000 + 2 * 4 is far beyond any bound by halves of the range, and finite.
    merge(copy.deepcopy(mlp), keep_base=False)
    with torch.no_grad():
        layer.lora_B.fill_(1000.0)
    with pytest.raises(NonFiniteError, match=r"block\.down: .*exceeds the range of torch.float16"):
        merge(mlp, keep_base=False)
    assert torch.equal(mlp.up.weight, before["up.weight"])


def test_of_wrapped_adapters_too(mlp: nn.Module) -> None:
    mlp.up = LoRAGaugeField(mlp.up, rank=2)
    adapted(mlp, target_modules=["down"])
    with torch.no_grad():
        mlp.up.base_model.weight[0, 0] = float("nan")
    before = mlp.block["down"].weight.clone()
    with pytest.raises(NonFiniteError, match=r"up: .*NaN"):
        merge_and_unload(mlp)
    assert torch.equal(mlp.block["down"].weight, before)


def test_an_interruption_leaves_whole_layers_and_can_be_gone_on_from(
    mlp: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(mlp)
    x = torch.randn(3, 12)
    before, expected = mlp(x), bits_of(merge(copy.deepcopy(mlp)))
    do = LoRALinear.merge_for_good

    def interrupted(layer: LoRALinear) -> None:
        if layer is mlp.block["down"]:
            raise KeyboardInterrupt
        do(layer)

    with monkeypatch.context() as patched:
        patched.setattr(LoRALinear, "merge_for_good", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_and_unload(mlp)
    assert mlp.up.merged
    assert not mlp.block["down"].merged
    torch.testing.assert_close(mlp(x), before)
    with pytest.raises(AdapterStateError, match="merged already"):
        merge(mlp, keep_base=False)
    merge_and_unload(mlp)
    assert torch.equal(mlp.up.weight, expected["up.weight"])
    assert torch.equal(mlp.block["down"].weight, expected["block.down.weight"])


_MEASURED = """
import sys
import torch
from torch import nn
import gauge_ext

def peak():
    # Not ru_maxrss, which is inherited; and not tracemalloc, which doesn't see torch.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))

sizes = dict(dtype=torch.bfloat16, bias=False)
model = nn.Sequential(*(nn.Linear(2048, 2048, **sizes) for _ in range(16)))  # 8 MiB each
gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=8))
for parameter in gauge_ext.adapter_parameters(model):
    nn.init.normal_(parameter)
small = gauge_ext.attach(nn.Sequential(nn.Linear(64, 64)), gauge_ext.LoRAConfig())
gauge_ext.merge_and_unload(small)  # what the code itself takes
held = list(model.parameters()) if sys.argv[1] == "held" else None
before = peak()
if sys.argv[1] == "kept":
    gauge_ext.merge(model)
else:
    gauge_ext.merge_and_unload(model)
print(peak() - before)
"""


@compiled
@pytest.mark.parametrize(
    ("how", "least", "most"), [("kept", 120, 150), ("held", 120, 150), ("alone", 0, 20)]
)
def test_memory_beside_the_model(how: str, least: float, most: float) -> None:
    """128 MiB of weights: as much again where the old ones stay, at most a layer or two if not."""
    command = [sys.executable, "-c", _MEASURED, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert least <= float(done.stdout) < most
