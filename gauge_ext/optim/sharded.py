"""Factors that FSDP2 has split: gathered for a step, and each process keeps its own part of it.

Half of the metric, A A^T, needs whole rows of A, but ``fully_shard`` splits A (r, in) and
B (out, r) along dimension 0, which is the rank for A. A pair is small, r (in + out) numbers, so
every process gathers the factors and their gradients, computes the same step, and writes its part.
The state of factors is whole on every process: it is saved and loaded as that of an unsharded run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; none exists before torch's module for them is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered if it is a DTensor: all its processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_of(value: Tensor, like: DTensor) -> DTensor:
    """Split a tensor that is the same on all processes as ``like`` is, without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def keep_part(factor: DTensor, value: Tensor) -> None:
    """Write this process's part of ``value`` into the factor."""
    factor.to_local().copy_(part_of(value, factor).to_local())
