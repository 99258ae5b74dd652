"""``lora_gather`` against a loop over the adapters in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from gather_problems import SCALING, Problem
from marks import needs_compiled
from torch import Tensor

from gauge_ext.ops import lora_gather, reference

pytestmark = needs_compiled

DTYPES = [
    (torch.float64, torch.float64, 1e-13),
    (torch.float32, torch.float32, 3e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
]
INDICES = {
    "each its own": [0, 1, 2, 3],
    "unsorted, with none": [2, -1, 0, 2, -1, 3, 0, 0, 2],
    "none at all": [-1, -1, -1],
    "one for many": [1] * 300,  # several tasks
    "many for each": [i % 4 for i in range(301)],
    "no row": [],
}


@pytest.mark.parametrize(("dtype", "factors", "tolerance"), DTYPES)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_values_and_gradients(
    index: list[int], dtype: torch.dtype, factors: torch.dtype, tolerance: float
) -> None:
    p = Problem(index, dtype=dtype, factors=factors)
    y = p.run()
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, p.leaves, p.grad)
    assert [g.dtype for g in gradients] == [t.dtype for t in p.leaves]
    for actual, expected in zip((y, *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, tolerance)


def test_one_entry_of_index_for_all_tokens_of_a_sample() -> None:
    p = Problem([1, -1, 3, 1], batch=(5, 2))
    gradients = torch.autograd.grad(p.run(), p.leaves, p.grad)
    for actual, expected in zip((p.run(), *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, 1e-13)
    every = p.index[:, None].expand(4, 5).contiguous()
    finer = lora_gather(p.x, p.weight, p.bias, p.lora_A, p.lora_B, SCALING, every)
    assert torch.equal(finer, p.run())
    one = lora_gather(p.x[:, 0], p.weight, p.bias, p.lora_A, p.lora_B, SCALING, torch.tensor(2))
    delta = SCALING[2] * p.lora_B[2] @ p.lora_A[2]
    assert_close(one, (p.x[:, 0] @ (p.weight + delta).T + p.bias).detach(), 1e-13)


def test_strides_no_bias_and_no_adapter() -> None:
    p = Problem([0, 2, 2])
    x = p.x.detach().T.contiguous().T
    weight = p.weight.T.contiguous().T
    a, b = ([t.detach().T.contiguous().T for t in ts] for ts in (p.lora_A, p.lora_B))
    y = lora_gather(x, weight, None, a, b, SCALING, p.index)
    assert_close(y + p.bias, p.by_hand()[0], 1e-13)
    none = lora_gather(x, weight, p.bias, [], [], [], torch.full((3,), -1))
    assert_close(none, x @ weight.T + p.bias, 1e-13)


def test_the_gradients_of_an_unfrozen_base() -> None:
    p = Problem([0, -1, 3])
    p.weight.requires_grad_()
    p.bias.requires_grad_()
    weight, bias = torch.autograd.grad(p.run(), (p.weight, p.bias), p.grad)
    assert_close(weight, p.grad.T @ p.x.detach(), 1e-13)
    assert_close(bias, p.grad.sum(0), 1e-13)


@pytest.mark.parametrize("wanted", [[0], [1, 5], [8]])
def test_only_the_gradients_that_are_wanted(wanted: list[int]) -> None:
    p = Problem([0, 3, -1, 0])
    leaves = p.leaves
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(place in wanted)
    gradients = torch.autograd.grad(p.run(), [leaves[i] for i in wanted], p.grad)
    for i, actual in zip(wanted, gradients, strict=True):
        assert_close(actual, p.by_hand()[1 + i], 1e-13)


def test_gradcheck_to_second_order() -> None:
    p = Problem([2, -1, 0, 2], sizes=(4, 3))
    a, b = p.lora_A[:3], p.lora_B[:3]
    p.weight.requires_grad_()
    p.bias.requires_grad_()

    def function(x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return lora_gather(x, weight, bias, factors[:3], factors[3:], SCALING[:3], p.index)

    inputs = (p.x, p.weight, p.bias, *a, *b)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    p = Problem([2, -1, 0], sizes=(4, 5), dtype=dtype)
    ops = torch.ops.gauge_ext
    call = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, list(SCALING), p.index)
    torch.library.opcheck(ops.lora_gather.default, call)
    plain = ([t.detach() for t in ts] for ts in (p.lora_A, p.lora_B))
    backward = (p.grad, p.x.detach(), p.weight, *plain, list(SCALING), p.index)
    torch.library.opcheck(ops.lora_gather_backward.default, (*backward, True, True))
    torch.library.opcheck(ops.lora_gather_backward.default, (*backward, False, False))


def test_the_same_bits_for_any_number_of_threads() -> None:
    p = Problem([i % 3 for i in range(700)], dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            _, *gradients = torch.autograd.grad(p.run(), p.leaves, p.grad)
            found.append(gradients)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_bad_adapter_does_not_touch_the_rows_of_others() -> None:
    p = Problem([0, 1, 0, -1], dtype=torch.float32)
    expected = p.by_hand()[0]
    with torch.no_grad():
        p.lora_A[1].fill_(float("nan"))
        y = p.run()
    others = [0, 2, 3]
    assert_close(y[others], expected[others], 3e-6)
    assert bool(y[1].isnan().all())


def test_nothing_is_saved_but_x() -> None:
    p = Problem([0, 1, 2], dtype=torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        p.run()
    parameters = {t.data_ptr() for t in (p.weight, p.index, *p.lora_A, *p.lora_B)}
    assert [t.data_ptr() for t in saved if t.data_ptr() not in parameters] == [p.x.data_ptr()]


def test_autocast_computes_the_base_in_the_lower_precision() -> None:
    p = Problem([3, 0, -1, 1], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = p.run()
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, p.leaves, p.grad.bfloat16())
    for actual, expected in zip((y, *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, 2e-2)


def test_the_reference_agrees() -> None:
    p = Problem([2, -1, 0, 2], batch=(3,))
    plain = reference.lora_gather(p.x, p.weight, p.bias, p.lora_A, p.lora_B, SCALING, p.index)
    assert_close(plain, p.by_hand()[0], 1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 5)}, r"x must have shape \[\*batch, in\] = \[\*, 4\].*got \[2, 5\]"),
        ({"weight": torch.ones(3)}, r"weight must have shape \[out, in\], got \[3\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[out\] = \[3\], got \[4\]"),
        ({"lora_A": [torch.ones(2, 5)]}, r"lora_A\[0\] must have shape \[r, in\] = \[\*, 4\]"),
        ({"lora_B": [torch.ones(3, 1)]}, r"lora_B\[0\] must have shape \[out, r\] = \[3, 2\]"),
        ({"lora_B": []}, "lora_B must have one entry for each of the 1 in lora_A, got 0"),
        ({"scaling": [1.0, 2.0]}, "scaling must have one entry for each of the 1 in lora_A, got 2"),
        ({"lora_A": [torch.ones(2, 4).double()]}, r"lora_A\[0\] must have x's dtype, Float"),
        ({"index": torch.tensor([0, 1])}, r"index must be in \[-1, 1\) for 1 adapters, got 1"),
        ({"index": torch.tensor([0, -2])}, r"index must be in \[-1, 1\) for 1 adapters, got -2"),
        ({"index": torch.tensor([0.0, 0.0])}, "index must be int64, got Float"),
        ({"index": torch.tensor([0])}, r"index must have the first batch dimensions of x.*\[1\]"),
        ({"index": torch.zeros(2, 4).long()}, "index must have the first batch dimensions of x"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(3, 4),
        "bias": torch.ones(3),
        "lora_A": [torch.ones(2, 4)],
        "lora_B": [torch.ones(3, 2)],
        "scaling": [1.0],
        "index": torch.tensor([0, -1]),
    }
    with pytest.raises(RuntimeError, match=message):
        lora_gather(**(arguments | change))
