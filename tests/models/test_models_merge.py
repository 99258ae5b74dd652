"""Merging whole models: all layers or none, tied weights untouched, copies that share."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import AdapterStateError, NonFiniteError
from gauge_ext.models import (
    adapter_parameters,
    attach,
    is_merged,
    lora_layers,
    merge,
    merged_copy,
    unmerge,
)


def adapted(model: nn.Module, **fields: object) -> nn.Module:
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, **fields}))  # type: ignore[arg-type]
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def storages(model: nn.Module) -> dict[str, int]:
    return {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}


def test_merging_is_by_hand_and_undone_bit_for_bit(
    bert: nn.Module, token_ids: Tensor, dtype: torch.dtype
) -> None:
    adapted(bert.to(dtype))
    parameters = dict(bert.named_parameters())
    bits = {name: p.detach().clone() for name, p in parameters.items()}
    before = bert(token_ids).last_hidden_state
    for _ in range(3):
        assert merge(bert) is bert
        assert is_merged(bert)
        for name, layer in lora_layers(bert).items():
            wide = torch.float64 if dtype is torch.float64 else torch.float32
            update = layer.scaling * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))
            expected = (bits[f"{name}.weight"].to(wide) + update).to(dtype)
            torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-7)
        # The merged weights are rounded to bfloat16; the unmerged sum never is.
        close = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
        torch.testing.assert_close(
            bert(token_ids).last_hidden_state, before, rtol=close, atol=close
        )
        assert unmerge(bert) is bert
        assert not is_merged(bert)
        assert all(p is parameters[name] for name, p in bert.named_parameters())
        assert all(torch.equal(p, bits[name]) for name, p in bert.named_parameters())
    assert torch.equal(bert(token_ids).last_hidden_state, before)


def test_a_tied_embedding_does_not_change(llama: nn.Module, token_ids: Tensor) -> None:
    embedding = llama.model.embed_tokens.weight
    assert llama.lm_head.weight is embedding
    bits = embedding.detach().clone()
    adapted(llama, target_modules=["lm_head", "q_proj"])
    logits = llama(token_ids).logits
    merge(llama)
    assert llama.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, bits)
    torch.testing.assert_close(llama(token_ids).logits, logits, rtol=1e-4, atol=1e-4)
    twin = merged_copy(llama)
    assert torch.equal(twin.model.embed_tokens.weight, bits)
    unmerge(llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, bits)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "weight"])
def test_what_is_not_finite_stops_all_of_it(mlp: nn.Module, factor: str) -> None:
    adapted(mlp)
    with torch.no_grad():
        getattr(mlp.block["down"], factor)[0, 0] = float("nan")
    before = dict(mlp.named_parameters())
    with pytest.raises(NonFiniteError, match=rf"block\.down: {factor} holds NaN") as caught:
        merge(mlp)
    assert caught.value.hint == "Nothing was merged."
    with pytest.raises(NonFiniteError):
        merged_copy(mlp)
    assert not is_merged(mlp)
    assert all(p is before[name] for name, p in mlp.named_parameters())
    merge(mlp, safe=False)
    assert is_merged(mlp)


def test_wrong_states_are_named(mlp: nn.Module) -> None:
    with pytest.raises(AdapterStateError, match="the model has no adapters"):
        merge(mlp)
    with pytest.raises(AdapterStateError, match="the model has no adapters"):
        unmerge(mlp)
    adapted(mlp)
    with pytest.raises(AdapterStateError, match="the model is not merged"):
        unmerge(mlp)
    mlp.block["down"].merge()
    with pytest.raises(AdapterStateError, match=r"1 of 2 .* merged already.*'block\.down'"):
        merge(mlp)
    assert not mlp.up.merged
    unmerge(mlp)
    merge(mlp, keep_base=False)
    with pytest.raises(AdapterStateError, match="base weight of 'up' was not kept"):
        unmerge(mlp)


def test_unmerging_is_all_or_nothing(mlp: nn.Module) -> None:
    adapted(mlp)
    mlp.up.merge()
    mlp.block["down"].merge(keep_base=False)
    with pytest.raises(AdapterStateError, match=r"'block\.down' was not kept"):
        unmerge(mlp)
    assert mlp.up.merged


@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_copy_shares_what_it_can_and_touches_nothing(
    bert: nn.Module, token_ids: Tensor, merged: bool
) -> None:
    adapted(bert, target_modules=["query", "dense"])
    before = bert(token_ids).last_hidden_state
    if merged:
        merge(bert)
    parameters = dict(bert.named_parameters())
    state = {name: t.clone() for name, t in bert.state_dict().items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    twin = merged_copy(bert)
    assert not lora_layers(twin)
    assert type(twin.encoder.layer[0].attention.self.query) is nn.Linear
    assert "_gauge_ext_attachment" not in vars(twin)
    assert not twin.training
    torch.testing.assert_close(twin(token_ids).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    ours, theirs = storages(twin), storages(bert)
    changed = {f"{name}.weight" for name in lora_layers(bert)}
    shared = {name for name in ours if ours[name] == theirs[name]}
    assert shared == set(ours) if merged else shared == set(ours) - changed
    # The copy may be converted, frozen and thrown away without a trace here.
    twin.to(torch.float64).requires_grad_(True)
    del twin
    assert all(p is parameters[name] for name, p in bert.named_parameters())
    assert {name: p.requires_grad for name, p in bert.named_parameters()} == flags
    assert all(torch.equal(t, state[name]) for name, t in bert.state_dict().items())
    assert is_merged(bert) is merged
    if merged:
        unmerge(bert)
    assert torch.equal(bert(token_ids).last_hidden_state, before)


def test_buffers_of_a_copy_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    attach(model, LoRAConfig(rank=2))
    twin = merged_copy(model)
    twin(torch.randn(8, 4) + 5)
    assert not model[1].running_mean.any()
    assert twin[1].running_mean.any()


def test_a_model_without_adapters_is_copied_as_it_is(mlp: nn.Module) -> None:
    x = torch.randn(3, 12)
    twin = merged_copy(mlp)
    assert twin is not mlp
    assert torch.equal(twin(x), mlp(x))
    assert storages(twin) == storages(mlp)


def test_parameters_that_are_shared_in_the_model_are_shared_in_the_copy(llama: nn.Module) -> None:
    twin = merged_copy(adapted(llama))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_adapters_on_a_part_of_the_model_are_merged_too(mlp: nn.Module) -> None:
    outer = nn.Sequential(mlp, nn.Linear(5, 3))
    adapted(mlp)
    x = torch.randn(3, 12)
    expected = outer(x)
    torch.testing.assert_close(merged_copy(outer)(x), expected)
    merge(outer)
    assert is_merged(mlp)


def test_what_cannot_be_copied_is_said(mlp: nn.Module) -> None:
    mlp.lock = threading.Lock()
    with pytest.raises(AdapterStateError, match="this MLP cannot be copied"):
        merged_copy(mlp)
    del mlp.lock
    mlp.cache = mlp(torch.randn(3, 12))  # not a leaf
    with pytest.raises(AdapterStateError, match="cannot be copied"):
        merged_copy(mlp)


def test_a_compiled_model_is_copied_without_its_wrapper(mlp: nn.Module) -> None:
    x = torch.randn(3, 12)
    adapted(mlp)
    twin = merged_copy(torch.compile(mlp, backend="eager"))
    assert type(twin) is type(mlp)
    torch.testing.assert_close(twin(x), mlp(x))


def test_merging_under_autograd_leaves_leaves(mlp: nn.Module) -> None:
    adapted(mlp)
    merge(mlp)
    assert all(p.is_leaf for p in mlp.parameters())
    x = torch.randn(3, 12, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in adapter_parameters(mlp))
    assert copy.deepcopy(mlp).up.merged
