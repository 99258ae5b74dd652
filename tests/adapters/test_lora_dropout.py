"""Dropout of an adapted layer: its seed, its mean, and one mask for both passes."""

from __future__ import annotations

import pytest
import torch
from lora_layers import adapted, branch_identity, weight_by_hand
from torch import nn
from torch.nn import functional as F


def test_dropout_is_for_training_alone_and_follows_the_seed() -> None:
    layer = adapted(64, 32, dropout=0.5)
    x = torch.randn(9, 64)
    layer.eval()
    exact = layer(x)
    torch.testing.assert_close(exact, F.linear(x, weight_by_hand(layer).float(), layer.bias))
    layer.train()
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(second, first)
    assert not torch.allclose(first, exact)
    layer.dropout_p = 0.0
    torch.testing.assert_close(layer(x), exact)


def test_dropout_keeps_the_expectation_and_spares_the_base() -> None:
    layer = adapted(16, 8, dropout=0.3, dtype=torch.float64)
    x = torch.randn(1, 16, dtype=torch.float64)
    # Many equal rows have masks of their own, so their mean tends to the value without dropout.
    mean = layer(x.expand(20000, 16)).mean(0)
    torch.testing.assert_close(
        mean, (x @ weight_by_hand(layer).T + layer.bias)[0], rtol=0, atol=0.1
    )
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_backward_sees_the_mask_of_the_forward() -> None:
    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, layer(x), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = adapted(64, 32, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(9, 32, dtype=torch.float64)
    branch_identity(layer, x, checkpoint(layer, x, use_reentrant=reentrant), g)
