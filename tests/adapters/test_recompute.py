"""An x that is computed again for backward gives the gradients of one that was kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kept_bytes import bytes_left
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gauge_ext.adapters import LoRALinear, recompute

ROWS, WIDTH, OUT, RANK = 6, 16, 8, 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


GAIN, SHIFT = normal(WIDTH, seed=2), normal(WIDTH, seed=3)


def rms_norm(h: Tensor) -> Tensor:
    """As transformers writes it: the product that is not kept lies between two that are."""
    return GAIN * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda h: F.layer_norm(h, (WIDTH,), GAIN, SHIFT),
    "layer norm without bias": lambda h: F.layer_norm(h, (WIDTH,), GAIN),
    "layer norm without weight": lambda h: F.layer_norm(h, (WIDTH,)),
    "rms norm": rms_norm,
    "gelu": F.gelu,
    "tanh gelu": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "gate": lambda h: F.silu(h) * (h + SHIFT),
    "view": lambda h: F.silu(h).view(2, ROWS // 2, WIDTH),
    "reshaped": lambda h: F.silu(h).reshape(-1, WIDTH),
    "cast": lambda h: F.silu(h.float()).double(),
    "dropped relu": lambda h: F.dropout(F.relu(h), 0.3),
    "quick gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "scaled tanh": lambda h: torch.tanh(h) * 0.5,
    "scaled": lambda h: F.gelu(h) * 0.5,
    "scaled in place": lambda h: F.gelu(h).mul_(0.5),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h + SHIFT,
    "product of matrices": lambda h: h @ torch.outer(GAIN, SHIFT),
    "half of a norm": lambda h: F.layer_norm(h, (WIDTH,)).chunk(1, -1)[0],
}


def layer(dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(WIDTH, OUT, rank=RANK, dropout=dropout, dtype=torch.float64)
    nn.init.normal_(made.lora_B)
    made.weight.requires_grad_(False)
    return made.train()


def gradients(
    made: LoRALinear, make: Callable[[Tensor], Tensor], recomputes: bool
) -> tuple[Tensor, ...]:
    h = normal(ROWS, WIDTH).requires_grad_()
    made.recomputes_input = recomputes
    torch.manual_seed(5)
    loss = made(make(h)).square().sum()
    return torch.autograd.grad(loss, (h, made.lora_A, made.lora_B))


def kept_beside(make: Callable[[Tensor], Tensor], recomputes: bool) -> int:
    """Return what layer and ``make`` leave, less what ``make`` alone does for its own backward."""
    made, h = layer(), normal(ROWS, WIDTH).requires_grad_()
    made.recomputes_input = recomputes

    def frozen() -> Tensor:
        return F.linear(make(h), made.weight, made.bias)

    return bytes_left(lambda: made(make(h))) - bytes_left(frozen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MADE | KEPT)
def test_gradients_are_equal(name: str, dropout: float) -> None:
    make = (MADE | KEPT)[name]
    made = layer(dropout)
    expected = gradients(made, make, recomputes=False)
    torch.testing.assert_close(gradients(made, make, recomputes=True), expected)


@pytest.mark.parametrize("name", MADE)
def test_only_the_narrow_product_is_kept(name: str) -> None:
    hidden, x = 8 * ROWS * RANK, 8 * ROWS * WIDTH
    assert kept_beside(MADE[name], recomputes=True) == hidden
    assert kept_beside(MADE[name], recomputes=False) == hidden + x


@pytest.mark.parametrize("name", KEPT)
def test_what_came_of_something_else_is_kept(name: str) -> None:
    assert kept_beside(KEPT[name], recomputes=True) == 8 * ROWS * (RANK + WIDTH)


@pytest.mark.parametrize("name", ["layer norm", "rms norm", "gate"])
def test_second_order(name: str) -> None:
    made, h = layer(), normal(ROWS, WIDTH).requires_grad_()
    made.recomputes_input = True
    leaves = (h, made.lora_A.detach().requires_grad_(), made.lora_B.detach().requires_grad_())

    def output(h: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        named = {"lora_A": lora_A, "lora_B": lora_B}
        return torch.func.functional_call(made, named, (MADE[name](h),))

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


def test_a_graph_that_is_retained_gives_the_same_again() -> None:
    made, h = layer(), normal(ROWS, WIDTH).requires_grad_()
    made.recomputes_input = True
    loss = made(F.gelu(h)).square().sum()
    first = torch.autograd.grad(loss, (h, made.lora_A), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, made.lora_A)), first, rtol=0, atol=0)


def test_layers_that_read_one_tensor_compute_it_once() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(0)
        return torch.ones(3)

    recipe = recompute.Recipe(compute)
    takers = [recipe.take() for _ in range(3)]
    values = [taker.value() for taker in takers]
    assert len(calls) == 1
    assert len({value.data_ptr() for value in values}) == 1
    takers[0].value()
    assert len(calls) == 2  # it was let go after the third


def test_a_changed_source_is_noticed_by_autograd() -> None:
    made, h = layer(), normal(ROWS, WIDTH).requires_grad_()
    made.recomputes_input = True
    source = h * 2.0
    y = made(F.silu(source))
    source.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_the_cast_is_computed_again(dtype: torch.dtype) -> None:
    made, h = layer().to(torch.float32), normal(ROWS, WIDTH).float().requires_grad_()
    found = {}
    for recomputes in (False, True):
        made.recomputes_input = recomputes

        def output() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return made(F.silu(h))

        y = output()
        found[recomputes] = torch.autograd.grad(y.float().square().sum(), (h, made.lora_A))
        found[f"bytes {recomputes}"] = bytes_left(output)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=0)
    assert found["bytes False"] - found["bytes True"] == ROWS * WIDTH * dtype.itemsize


def test_half_precision_norms() -> None:
    made, h = layer().to(torch.bfloat16), normal(64, WIDTH).bfloat16().requires_grad_()
    for norm_dtype, recomputed in ((torch.float32, True), (torch.bfloat16, False)):
        norm = nn.LayerNorm(WIDTH, dtype=norm_dtype)
        found, kept = [], []
        for recomputes in (False, True):
            made.recomputes_input = recomputes
            found.append(torch.autograd.grad(made(norm(h)).float().sum(), made.lora_A)[0])
            kept.append(bytes_left(lambda norm=norm: made(norm(h))))
        torch.testing.assert_close(found[1], found[0], rtol=2**-8, atol=2**-8)
        assert kept[0] - kept[1] == (64 * WIDTH * 2 if recomputed else 0)


@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "save_on_cpu", "compiled", "func"])
def test_where_others_decide_x_is_left_to_them(way: str) -> None:
    made = layer()
    expected = gradients(made, F.gelu, recomputes=False)
    made.recomputes_input = True
    h = normal(ROWS, WIDTH).requires_grad_()

    def output(h: Tensor) -> Tensor:
        return made(F.gelu(h))

    if way == "func":
        grad = torch.func.grad(lambda h: output(h).square().sum())(h)
        torch.testing.assert_close(grad, expected[0])
        return
    if way == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            y = output(h)
    elif way == "compiled":
        y = torch.compile(output, backend="aot_eager", fullgraph=True)(h)
    else:
        y = checkpoint(output, h, use_reentrant=way == "reentrant")
    loss = y.square().sum()
    loss.backward()
    assert h.grad is not None
    assert made.lora_A.grad is not None
    torch.testing.assert_close((h.grad, made.lora_A.grad), expected[:2])
