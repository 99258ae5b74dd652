"""Products with W + s L R by the factors against products with the sum, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gauge_ext.adapters.low_rank_sum import LowRankSum

STACK, OUT, IN, RANK = 3, 8, 16, 2
SCALING = 0.75


class Watch:
    """The factors, and whether the sum was formed."""

    def __init__(self, dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None):
        torch.manual_seed(0)
        wide = factors or dtype
        self.weight = torch.randn(STACK, OUT, IN, dtype=dtype)
        self.left = torch.randn(STACK, OUT, RANK, dtype=wide, requires_grad=True)
        self.right = torch.randn(STACK, RANK, IN, dtype=wide, requires_grad=True)
        self.sum = LowRankSum(self.weight, self.left, self.right, SCALING)
        update = SCALING * torch.einsum("eor,eri->eoi", self.left.double(), self.right.double())
        self.expected = self.weight.double() + update


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


BY_FACTORS: dict[str, Callable[[Any], Tensor]] = {
    "linear of one": lambda w: F.linear(inputs(5, IN), w[1], torch.ones(OUT).double()),
    "linear of one, tensor index": lambda w: F.linear(inputs(2, 5, IN), w[torch.tensor(2)]),
    "x @ W.T": lambda w: inputs(5, IN) @ w[0].T,
    "x @ W.t()": lambda w: inputs(5, IN) @ w[0].t(),
    "W @ x": lambda w: w[-1] @ inputs(IN, 4),
    "torch.mm": lambda w: torch.mm(inputs(5, OUT), w[0]),
    "bmm": lambda w: torch.bmm(w, inputs(STACK, IN, 4)),
    "bmm, transposed": lambda w: torch.bmm(inputs(STACK, 4, IN), w.transpose(1, 2)),
    "bmm of chosen": lambda w: torch.bmm(w[torch.tensor([2, 0, 0, 1])], inputs(4, IN, 1)),
    "matmul": lambda w: torch.matmul(inputs(7, STACK, 4, IN), w.mT),
}

BY_THE_SUM: dict[str, Callable[[Any], Tensor]] = {
    "einsum": lambda w: torch.einsum("ni,eoi->eno", inputs(5, IN), w),
    "slice": lambda w: inputs(5, IN) @ w[1:].mT,
    "iteration": lambda w: torch.cat([inputs(5, IN) @ one.T for one in w]),
    "mask": lambda w: w[torch.tensor([True, False, True])],
    "plus": lambda w: w + 1,
    "norm": lambda w: w[0].norm(dim=1),
    "transpose of the stack": lambda w: torch.transpose(w, 0, 1).contiguous(),
    "conv": lambda w: F.conv1d(inputs(1, OUT, IN), w.mT.mT),
}


@pytest.mark.parametrize("name", [*BY_FACTORS, *BY_THE_SUM])
def test_values_and_gradients_are_those_of_the_sum(name: str) -> None:
    function = (BY_FACTORS | BY_THE_SUM)[name]
    watch = Watch()
    found, expected = function(watch.sum), function(watch.expected)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (watch.left, watch.right), direction)
    theirs = torch.autograd.grad(expected, (watch.left, watch.right), direction)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", BY_FACTORS)
def test_products_never_form_the_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(self: LowRankSum) -> Tensor:
        raise AssertionError("the sum was formed")

    monkeypatch.setattr(LowRankSum, "dense", formed)
    BY_FACTORS[name](Watch().sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(dtype: torch.dtype, transposed: bool) -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    watch = Watch(dtype, torch.float32)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second matrix gets no rows
    x = inputs(7, OUT if transposed else IN, dtype=dtype)
    weight = watch.sum if transposed else watch.sum.transpose(-2, -1)
    found = F.grouped_mm(x, weight, offs=ends)
    dense = watch.expected if transposed else watch.expected.mT
    expected = torch.cat([x[:2].double() @ dense[0], x[2:].double() @ dense[2]])
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close * 5)
    direction = torch.randn(found.shape)
    ours = torch.autograd.grad(found, (watch.left, watch.right), direction.to(dtype))
    theirs = torch.autograd.grad(expected, (watch.left, watch.right), direction.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=close * 5, atol=close * 20)


def test_beside_a_bfloat16_weight_a_small_update_is_not_lost() -> None:
    weight = torch.ones(1, 4, 4).bfloat16()
    left, right = torch.full((1, 4, 1), 1e-3), torch.ones(1, 1, 4)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0 + 2**-7]]).bfloat16()
    assert torch.equal((weight + left.bfloat16() @ right.bfloat16()), weight)  # as in a merge
    found = F.linear(x, LowRankSum(weight, left, right, 100.0)[0])
    torch.testing.assert_close(found.float(), torch.full((1, 4), 1.1 * 2**-7), rtol=1e-2, atol=0)


def test_it_tells_what_the_weight_tells() -> None:
    watch = Watch(torch.bfloat16, torch.float32)
    told, weight = watch.sum, watch.weight
    assert isinstance(told, Tensor)
    for ask in (
        lambda t: (t.shape, t.size(1), t.dim(), t.ndim, len(t), t.numel(), t.stride()),
        lambda t: (t.dtype, t.device, t.layout, t.requires_grad, t.is_meta, t.is_cuda),
        lambda t: (t.is_floating_point(), t.is_contiguous(), t.element_size()),
    ):
        assert ask(told) == ask(weight)
    assert "_dense" not in vars(told)


def test_under_autocast() -> None:
    watch, x = Watch(torch.float32), inputs(5, IN, dtype=torch.float32)
    expected = x.double() @ watch.expected[1].T
    with torch.autocast("cpu", torch.bfloat16):
        for found in (F.linear(x, watch.sum[1]), x @ watch.sum[1].T, x @ watch.sum.mT[1]):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.3)


def test_what_comes_past_torchs_functions_is_refused() -> None:
    watch = Watch()
    refused = pytest.raises(RuntimeError, match=r"compiled code .* adapter.*gauge_ext.merge")
    with refused, torch._C.DisableTorchFunctionSubclass():
        torch.ops.aten.bmm(watch.sum, inputs(STACK, IN, 4))
