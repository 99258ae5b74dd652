"""The compiled ``lora_linear_group`` against formulas written out in float64, and its members."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from group_problems import GROUPS, by_hand, make
from linear_problems import DTYPES
from marks import needs_compiled
from torch import Tensor

from gauge_ext.ops import lora_linear, lora_linear_group, reference

pytestmark = needs_compiled


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_values_and_gradients(
    group: tuple[int, int, tuple[tuple[int, int], ...]],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    tolerance: float,
    dropout_p: float,
) -> None:
    p = make(group, dtype, adapter_dtype)
    ys = lora_linear_group(*p.arguments(dropout_p))
    gradients = torch.autograd.grad(ys, p.differentiable, p.grads)
    assert all(y.dtype == dtype for y in ys)
    assert [g.dtype for g in gradients] == [t.dtype for t in p.differentiable]
    exact_ys, exact_gradients = by_hand(p, dropout_p)
    with torch.no_grad():
        again = lora_linear_group(*p.arguments(dropout_p))
    expected = [*exact_ys, *exact_gradients, *exact_ys]
    for actual, exact in zip([*ys, *gradients, *again], expected, strict=True):
        assert_close(actual, exact, tolerance)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_equals_its_members(dropout_p: float) -> None:
    p = make(GROUPS[0])
    ys = lora_linear_group(*p.arguments(dropout_p))
    gradients = torch.autograd.grad(ys, p.differentiable, p.grads)
    each = [
        lora_linear(p.x, *member[:-1], dropout_p, member[-1])
        for member in zip(
            p.weights, p.biases, p.lora_As, p.lora_Bs, p.scalings, p.seeds, strict=True
        )
    ]
    for actual, expected in zip(ys, each, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    exact = torch.autograd.grad(each, p.differentiable, p.grads)
    torch.testing.assert_close(gradients, exact, rtol=1e-13, atol=1e-13)


def test_the_reference_says_the_same() -> None:
    p = make(GROUPS[0])
    expected = reference.lora_linear_group(*p.arguments(0.3))
    torch.testing.assert_close(lora_linear_group(*p.arguments(0.3)), expected)


def test_one_seed_is_for_all() -> None:
    p = make(GROUPS[0])
    p.seeds = p.seeds[:1]
    shared = lora_linear_group(*p.arguments(0.3))
    p.seeds = p.seeds * 3
    assert all(map(torch.equal, shared, lora_linear_group(*p.arguments(0.3))))


def test_batch_dimensions_and_strides() -> None:
    p = make((24, 20, ((12, 3), (8, 2))))
    p.x = p.x.detach().view(4, 6, 20).transpose(0, 1).requires_grad_()
    p.weights = [weight.T.contiguous().T for weight in p.weights]
    ys = lora_linear_group(*p.arguments())
    grads = [grad.view(4, 6, -1).transpose(0, 1) for grad in p.grads]
    (grad_x,) = torch.autograd.grad(ys, p.x, grads)
    p.x = p.x.detach().transpose(0, 1).reshape(24, 20)
    exact_ys, exact = by_hand(p)
    for y, expected in zip(ys, exact_ys, strict=True):
        assert_close(y.transpose(0, 1).reshape(24, -1), expected, 1e-13)
    assert_close(grad_x.transpose(0, 1).reshape(24, 20), exact[0], 1e-13)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_outputs_that_nothing_depends_on(used: tuple[int, ...]) -> None:
    p = make(GROUPS[0])
    ys = lora_linear_group(*p.arguments(0.3))
    wanted = [p.x, *(p.lora_As[i] for i in used), *(p.lora_Bs[i] for i in used)]
    chosen = [ys[i] for i in used], wanted, [p.grads[i] for i in used]
    gradients = torch.autograd.grad(*chosen)
    for i in set(range(3)) - set(used):
        p.grads[i].zero_()
    exact = by_hand(p, 0.3)[1]
    expected = [exact[0], *(exact[1 + i] for i in used), *(exact[4 + i] for i in used)]
    for actual, value in zip(gradients, expected, strict=True):
        assert_close(actual, value, 1e-13)


def test_gradients_of_unfrozen_bases_alone() -> None:
    p = make(GROUPS[0])
    for tensor in p.differentiable:
        tensor.requires_grad_(False)
    bias = p.biases[2]
    assert bias is not None
    parameters = (p.weights[0].requires_grad_(), bias.requires_grad_())
    ys = lora_linear_group(*p.arguments())
    grad_weight, grad_bias = torch.autograd.grad([ys[0], ys[2]], parameters, [*p.grads[::2]])
    assert_close(grad_weight, p.grads[0].T @ p.x, 1e-13)
    assert_close(grad_bias, p.grads[2].sum(0), 1e-13)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_to_second_order(dropout_p: float) -> None:
    p = make()
    bias = p.biases[0]
    assert bias is not None
    inputs = (p.x, p.weights[0].requires_grad_(), bias.requires_grad_(), *p.lora_As, *p.lora_Bs)

    def function(x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        members = [weight, p.weights[1]], [bias, None], list(factors[:2]), list(factors[2:])
        return tuple(lora_linear_group(x, *members, p.scalings, dropout_p, p.seeds))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_opcheck(dropout_p: float) -> None:
    p = make(dtype=torch.float32)
    ops = torch.ops.gauge_ext
    torch.library.opcheck(ops.lora_linear_group.default, p.arguments(dropout_p))
    for tensor in p.differentiable:
        tensor.requires_grad_(False)
    torch.library.opcheck(ops.lora_linear_group_forward.default, p.arguments(dropout_p))
    _, hiddens = ops.lora_linear_group_forward(*p.arguments(dropout_p))
    factors = (p.weights, p.lora_As, p.lora_Bs, hiddens, p.scalings, dropout_p, p.seeds)
    for wanted in ((True, True), (True, False), (False, True)):
        call = (p.grads, p.x, *factors, *wanted)
        torch.library.opcheck(ops.lora_linear_group_backward.default, call)


def test_x_is_saved_once_and_one_gradient_of_it_is_made() -> None:
    p = make((16, 32, ((24, 4), (8, 4), (8, 4))), torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = lora_linear_group(*p.arguments(0.1))
    own = {t.data_ptr() for t in (*p.weights, *p.lora_As, *p.lora_Bs, *p.seeds)}
    kept = [t for t in saved if t.data_ptr() not in own]
    assert sorted(t.numel() for t in kept) == [16 * 4] * 3 + [16 * 32]  # the hiddens, x
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(ys, p.differentiable, p.grads)
    called = [event.name for event in profile.events()]
    assert called.count("gauge_ext::lora_linear_group_backward") == 1
    assert not [name for name in called if name.startswith("aten::add")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights must have at least one member, got none"),
        ({"biases": [None]}, "biases must have an entry for each of the 2 weights, got 1"),
        ({"lora_As": []}, "lora_As must have an entry for each of the 2 weights, got 0"),
        ({"lora_Bs": []}, "lora_Bs must have an entry for each of the 2 weights, got 0"),
        ({"scalings": [1.0] * 3}, "scalings must have an entry for each of the 2 weights, got 3"),
        ({"seeds": [torch.tensor(1)] * 3}, "seeds must be none, one for all or one for each of"),
        ({"dropout_p": 0.5, "seeds": []}, "seeds must hold a 0-dim int64 tensor where dropout_p"),
        ({"dropout_p": 1.5, "seeds": [torch.tensor(1)]}, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"x": torch.ones(2, 5)}, r"x must have shape \[\*batch, in\] = \[\*, 4\].*got \[2, 5\]"),
        ({"lora_Bs": [torch.ones(3, 2)] * 2}, r"lora_B must have shape \[out, r\] = \[3, 1\]"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 4),
        "weights": [torch.ones(3, 4)] * 2,
        "biases": [torch.ones(3), None],
        "lora_As": [torch.ones(2, 4), torch.ones(1, 4)],
        "lora_Bs": [torch.ones(3, 2), torch.ones(3, 1)],
        "scalings": [1.0, 1.0],
        "dropout_p": 0.0,
        "seeds": [],
    }
    with pytest.raises(RuntimeError, match=message):
        lora_linear_group(**(arguments | change))
    if "entry for each" in message:
        with pytest.raises(RuntimeError, match=message):
            reference.lora_linear_group(**(arguments | change))
