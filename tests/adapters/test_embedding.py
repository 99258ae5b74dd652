"""Adapted tables: when they are one op, and which gradients are sparse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gauge_ext import _load
from gauge_ext.adapters import AdapterSpec, adapt


@pytest.mark.skipif(not _load.status().compiled, reason="nothing compiled is loaded")
@pytest.mark.parametrize(
    ("change", "of_table", "one_pass"),
    [
        ({}, {}, True),
        ({"dropout": 0.5}, {}, False),
        ({"use_dora": True}, {}, False),
        ({}, {"sparse": True}, True),
        ({}, {"scale_grad_by_freq": True}, False),
        ({"dtype": torch.bfloat16}, {}, False),
    ],
    ids=str,
)
def test_the_layer_takes_it_where_it_computes_all_there_is(
    change: dict[str, object], of_table: dict[str, bool], one_pass: bool
) -> None:
    table = nn.Embedding(7, 5, **of_table).requires_grad_(False)
    layer = adapt(table, AdapterSpec(rank=2, **change))  # type: ignore[arg-type]
    y = layer(torch.tensor([1, 2, 2]))
    assert ("LoraEmbedding" in y.grad_fn.name()) == one_pass


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_sparse_table_keeps_its_gradient_sparse_and_the_factors_dense(
    trained: bool, dropout: float
) -> None:
    table = nn.Embedding(7, 5, sparse=True, dtype=torch.float64)
    layer = adapt(table, AdapterSpec(rank=2, dropout=dropout))
    layer.weight.requires_grad_(trained)
    ids, grad = torch.tensor([1, 2, 2]), torch.arange(15.0, dtype=torch.float64).view(3, 5)
    nn.init.normal_(layer.lora_A)
    layer(ids).backward(grad)
    assert layer.lora_A.grad.layout == layer.lora_B.grad.layout == torch.strided
    if dropout == 0.0:
        expected = torch.zeros(2, 7, dtype=torch.float64)
        for token, given in zip(ids.tolist(), grad, strict=True):
            expected[:, token] += layer.scaling * layer.lora_B.detach().T @ given
        torch.testing.assert_close(layer.lora_A.grad, expected)
    assert (layer.weight.grad is not None) == trained
    if trained:
        assert layer.weight.grad.layout == torch.sparse_coo
        of_table = torch.zeros(7, 5, dtype=torch.float64).index_add(0, ids, grad)
        torch.testing.assert_close(layer.weight.grad.to_dense(), of_table)
