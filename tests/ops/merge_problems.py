"""Weights and factors for ``merge_``, their sum in float64, and the room that rounding has."""

from __future__ import annotations

import torch
from torch import Tensor

# (out, in, r): tails of every tile, one row, one column, rank over a block, nothing at all
SIZES = [(13, 37, 5), (64, 256, 8), (1, 130, 4), (100, 1, 3), (7, 300, 300), (0, 8, 2), (6, 0, 2)]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


NARROW = [torch.bfloat16, torch.float16]


# Half a unit in the last place, beside the float32 of the sum
HALF_UNIT = {
    torch.float64: 2e-15,
    torch.float32: 3e-7,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


Problem = tuple[Tensor, Tensor, Tensor]


def make(sizes: tuple[int, int, int], dtype: torch.dtype, transposed: bool = False) -> Problem:
    rows, columns, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(rows, columns).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, inner = (columns, rows) if transposed else (rows, columns)
    return weight, normal(rank, inner).to(wide), normal(out, rank).to(wide)


def by_hand(problem: Problem, scaling: float, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return W + s·B·A and s·B·A in float64."""
    weight, lora_A, lora_B = (tensor.double() for tensor in problem)
    delta = scaling * torch.einsum("or,ri->oi", lora_B, lora_A)
    delta = delta.T if transposed else delta
    return weight + delta, delta


def assert_rounded(actual: Tensor, exact: Tensor, size: float) -> None:
    """Hold ``actual`` against ``exact`` within half a unit in the last place of its dtype."""
    room = HALF_UNIT[actual.dtype] * exact.abs() + 1e-6 * size
    if actual.dtype == torch.float64:
        room = 1e-14 * size + 0 * exact
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= room).all())
