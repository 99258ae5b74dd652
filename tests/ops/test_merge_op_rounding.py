"""``merge_`` rounds once, or by chance, and sees what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from marks import needs_compiled
from merge_problems import DTYPES, NARROW, make
from torch import Tensor

from gauge_ext.ops import draw_seed, merge_, merge_into, reference

pytestmark = needs_compiled


def test_the_update_is_rounded_once_and_not_before_it_is_added() -> None:
    # 1 + 2^-9 + 2^-9 is 1 + 2^-8 in bfloat16 to one more bit: each part alone would round to 1.
    weight = torch.ones(4, 32, dtype=torch.bfloat16)
    lora_A, lora_B = torch.ones(3, 32), torch.full((4, 3), 2.0**-9)
    merge_(weight, lora_A, lora_B, 1.0)
    assert torch.equal(weight, torch.full((4, 32), 1 + 2.0**-7, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("power", [0, -15, -25])
def test_rounding_by_chance_is_the_references(dtype: torch.dtype, power: int) -> None:
    """The sums are exact in float32, so every bit must agree; 2^-15 and 2^-25 reach subnormals."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-512, 513, (23, 200), generator=generator) * 2.0 ** (power - 8)
    lora_A = torch.randint(-9, 10, (2, 200), generator=generator).float()
    lora_B = torch.randint(-9, 10, (23, 2), generator=generator) * 2.0 ** (power - 13)
    weight = weight.to(dtype)
    seed = torch.tensor(987654321)
    out = [torch.empty_like(weight), torch.empty_like(weight)]
    merge_into(out, [weight] * 2, [lora_A] * 2, [lora_B] * 2, 0.5, seed=seed)
    exact = (weight.double() + 0.5 * lora_B.double() @ lora_A.double()).float()
    for layer in range(2):
        bits = reference.rounding_bits(23, 200, seed, layer)
        assert torch.equal(out[layer], reference.round_stochastic(exact, dtype, bits))
    assert not torch.equal(*out)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_by_chance_keeps_the_expectation(dtype: torch.dtype) -> None:
    weight = torch.ones(400, 500, dtype=dtype)
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    lora_A, lora_B = torch.ones(1, 500), torch.full((400, 1), 0.3 * step)
    (nearest,) = merge_into(torch.empty_like(weight), weight, lora_A, lora_B, 1.0, fidelity=True)
    assert nearest.kept == 0.0  # all of the update is lost
    assert nearest.lost == pytest.approx(nearest.delta)
    merge_(weight, lora_A, lora_B, 1.0, seed=draw_seed())
    up = (weight.double() - 1) / step
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert abs(up.mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / up.numel())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("columns", [1, 5], ids="{0} x 8 columns".format)
@pytest.mark.parametrize("seed", [None, torch.tensor(4)])
def test_signs_zeros_and_what_is_not_finite(
    dtype: torch.dtype, columns: int, seed: Tensor | None
) -> None:
    rare = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, torch.finfo(dtype).max] * columns
    weight = torch.tensor([rare, [1.0] * len(rare)] * 8, dtype=dtype)
    out = torch.empty_like(weight)
    right = torch.zeros(1, len(rare))
    (sums,) = merge_into(out, weight, right, torch.zeros(16, 1), 1.0, seed=seed)
    torch.testing.assert_close(out, weight, rtol=0, atol=0, equal_nan=True)
    assert not sums.finite
    assert merge_(weight[1::2], right, torch.zeros(8, 1), 1.0, seed=seed)[0].finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (12, 36), (5, 17)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_entry_is_seen(dtype: torch.dtype, place: tuple[int, int], bad: float) -> None:
    weight, lora_A, lora_B = make((13, 37, 2), dtype)
    weight[place] = bad
    other = torch.zeros(2, 2)
    zeros = [torch.zeros(1, 2), torch.zeros(2, 1)]
    sums = merge_([other, weight], [zeros[0], lora_A], [zeros[1], lora_B], 1.0)
    assert [one.finite for one in sums] == [True, False]


@pytest.mark.parametrize("columns", [9, 40])
@pytest.mark.parametrize("dtype", NARROW)
def test_an_overflow_is_seen(dtype: torch.dtype, columns: int) -> None:
    largest = torch.finfo(dtype).max
    weight = torch.full((7, columns), largest, dtype=dtype)
    (sums,) = merge_(weight, torch.full((1, columns), largest / 3), torch.ones(7, 1), 1.0)
    assert not sums.finite
    assert bool(weight.isinf().all())
