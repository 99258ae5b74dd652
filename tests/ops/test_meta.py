"""Tensors without values are not computed with as if they had some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gauge_ext import _load, ops

pytestmark = pytest.mark.skipif(
    not _load.status().compiled, reason="only compiled ops have fake kernels"
)


def arguments(**where: str) -> dict[str, Tensor]:
    shapes = {"x": (3, 6), "weight": (5, 6), "lora_A": (2, 6), "lora_B": (5, 2)}
    return {
        name: torch.empty(shape, device=where.get(name, where.get("all", "cpu")))
        for name, shape in shapes.items()
    }


def linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return ops.lora_linear(x, weight, None, lora_A, lora_B, 1.0)


def group(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return ops.lora_linear_group(x, [weight], [None], [lora_A], [lora_B], [1.0])[0]


def gather(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    index = torch.zeros(3, dtype=torch.int64, device=x.device)
    return ops.lora_gather(x, weight, None, [lora_A], [lora_B], [1.0], index)


def embedding(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    ids = torch.zeros(3, dtype=torch.int64, device=x.device)
    return ops.lora_embedding(ids, weight.mT, lora_A, lora_B, 1.0)


def norms(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return ops.dora_row_norms(weight, lora_A, lora_B, 1.0).expand(len(x), -1)


OPS = [linear, group, gather, embedding, norms]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("missing", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("trained", [True, False])
def test_some_without_values_are_refused(
    op: Callable[..., Tensor], missing: str, trained: bool
) -> None:
    given: dict[str, Any] = arguments(**{missing: "meta"})
    given["lora_A"].requires_grad_(trained)
    with pytest.raises(RuntimeError, match=r"some are on the meta device.*never loaded"):
        op(**given)


@pytest.mark.parametrize("op", OPS)
def test_all_without_values_give_shapes(op: Callable[..., Tensor]) -> None:
    found = op(**arguments(all="meta"))
    assert found.is_meta
    assert found.shape == (3, 5)
