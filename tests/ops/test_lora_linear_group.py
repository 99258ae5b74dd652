"""The compiled ``lora_linear_group`` against formulas written out in float64, and its members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from gauge_ext import _load
from gauge_ext.ops import draw_seed, lora_linear, lora_linear_group, reference

pytestmark = pytest.mark.skipif(
    not _load.status().compiled, reason="tests the compiled op; nothing compiled is loaded"
)

# (N, in, ((out, r), ...)): grouped-query attention, one member, no row, merging and chunks
GROUPS: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [
    (7, 37, ((51, 5), (20, 3), (20, 5))),
    (1, 128, ((130, 4), (64, 4))),
    (33, 60, ((26, 17),)),
    (0, 8, ((8, 2), (4, 1))),
    (600, 40, ((24, 3), (40, 2), (9, 8))),
]
DTYPES = [
    (torch.float64, torch.float64, 1e-13),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
]


@dataclass
class Problem:
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    grads: list[Tensor]
    seeds: list[Tensor]

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.x, *self.lora_As, *self.lora_Bs]

    def arguments(self, dropout_p: float = 0.0) -> tuple[Any, ...]:
        lists = (self.weights, self.biases, self.lora_As, self.lora_Bs, self.scalings)
        return (self.x, *lists, dropout_p, self.seeds)


def make(
    group: tuple[int, int, tuple[tuple[int, int], ...]] = (3, 4, ((5, 2), (2, 1))),
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
) -> Problem:
    rows, width, members = group
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    own = adapter_dtype or dtype
    return Problem(
        x=normal(rows, width).requires_grad_(),
        weights=[normal(out, width) for out, _ in members],
        biases=[None if i == 1 else normal(out) for i, (out, _) in enumerate(members)],
        lora_As=[normal(r, width, dtype=own).requires_grad_() for _, r in members],
        lora_Bs=[normal(out, r, dtype=own).requires_grad_() for out, r in members],
        scalings=[0.7 - 0.2 * i for i in range(len(members))],
        grads=[normal(rows, out) for out, _ in members],
        seeds=[torch.tensor(1234567890123456789 + i) for i in range(len(members))],
    )


def by_hand(p: Problem, dropout_p: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradients of :attr:`Problem.differentiable`, in float64."""
    x = p.x.detach().double()
    ys, grad_x, grad_As, grad_Bs = [], torch.zeros_like(x), [], []
    for i, s in enumerate(p.scalings):
        mask = reference.dropout_mask(*x.shape, dropout_p, p.seeds[i])
        weight, a, b, g = (
            t[i].detach().double() for t in (p.weights, p.lora_As, p.lora_Bs, p.grads)
        )
        bias = p.biases[i]
        y = x @ weight.T + s * ((x * mask) @ a.T @ b.T)
        ys.append(y if bias is None else y + bias.double())
        grad_x += g @ weight + s * (g @ b @ a) * mask
        grad_As.append(s * (g @ b).T @ (x * mask))
        grad_Bs.append(s * g.T @ ((x * mask) @ a.T))
    return ys, [grad_x, *grad_As, *grad_Bs]


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


class Group(nn.Module):
    """Two layers on the op alone, the second without a bias."""

    def __init__(self, dropout_p: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = make(dtype=dtype)
        self.scalings, self.dropout_p = p.scalings, dropout_p
        self.weights = nn.ParameterList(p.weights).requires_grad_(False)
        self.bias = nn.Parameter(torch.ones(5, dtype=dtype), requires_grad=False)
        self.lora_As = nn.ParameterList(nn.Parameter(a.detach()) for a in p.lora_As)
        self.lora_Bs = nn.ParameterList(nn.Parameter(b.detach()) for b in p.lora_Bs)

    def call(self, function: Callable[..., Any], x: Tensor) -> list[Tensor]:
        seeds = [draw_seed(), draw_seed()] if self.dropout_p > 0 else []
        lists = list(self.weights), [self.bias, None], list(self.lora_As), list(self.lora_Bs)
        return list(function(x, *lists, self.scalings, self.dropout_p, seeds))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.call(lora_linear_group, x)

    def by_hand(self, x: Tensor) -> list[Tensor]:
        first, second = (
            x @ (w + s * b @ a).T
            for w, s, b, a in zip(
                self.weights, self.scalings, self.lora_Bs, self.lora_As, strict=True
            )
        )
        return [first + self.bias, second]


def inputs(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows), dtype=dtype)


def total(ys: list[Tensor]) -> Tensor:
    return sum((y.square().sum() for y in ys), torch.zeros(()))


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Group()
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        x = inputs(rows).requires_grad_()
        parameters = (x, *layer.lora_As, *layer.lora_Bs)
        exact = torch.autograd.grad(total(layer.by_hand(x)), parameters)
        ys = compiled(x)
        torch.testing.assert_close(ys, layer.by_hand(x))
        torch.testing.assert_close(torch.autograd.grad(total(ys), parameters), exact)


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Raw(Group):
        def forward(self, x: Tensor) -> list[Tensor]:
            return self.call(torch.ops.gauge_ext.lora_linear_group, x)

    layer, path = Raw(dtype=torch.float32).eval(), tmp_path / "layer.onnx"
    example, dynamic = inputs(dtype=torch.float32), ({0: torch.export.Dim("rows")},)
    torch.onnx.export(layer, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = inputs(9, torch.float32)
    ys = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    for y, expected in zip(ys, layer.by_hand(other), strict=True):
        np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-5)


def test_jit_trace_records_ordinary_operators() -> None:
    class Sum(Group):
        def forward(self, x: Tensor) -> Tensor:
            return total(super().forward(x))

    layer = Sum()
    traced = torch.jit.trace(layer, (inputs(),))
    assert "gauge_ext::" not in str(traced.graph)
    torch.testing.assert_close(traced(inputs(9)), total(layer.by_hand(inputs(9))))


def test_torch_func_and_forward_mode() -> None:
    layer, x = Group(), inputs(6)
    actual = torch.func.vmap(torch.func.grad(lambda x: total(layer(x))))(x)
    expected = torch.func.vmap(torch.func.grad(lambda x: total(layer.by_hand(x))))(x)
    torch.testing.assert_close(actual, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in layer(dual)]
    zero = layer.by_hand(torch.zeros_like(x))
    for tangent, y, constant in zip(tangents, layer.by_hand(torch.ones_like(x)), zero, strict=True):
        torch.testing.assert_close(tangent, y - constant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_masks_again(use_reentrant: bool) -> None:
    layer, x = Group(dropout_p=0.5), inputs(50)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        if checkpointed:
            run = torch.utils.checkpoint.checkpoint
            y = run(lambda x: total(layer(x)), leaf, use_reentrant=use_reentrant)
        else:
            y = total(layer(leaf))
        layer.zero_grad()
        y.backward()
        gradients.append([leaf.grad, *(a.grad for a in layer.lora_As)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_autocast_computes_the_bases_in_the_lower_precision() -> None:
    p = make(GROUPS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = lora_linear_group(*p.arguments())
    assert [y.dtype for y in ys] == [torch.bfloat16] * 3
    gradients = torch.autograd.grad(ys, p.differentiable, [g.bfloat16() for g in p.grads])
    exact_ys, exact = by_hand(p)
    for actual, expected in zip([*ys, *gradients], [*exact_ys, *exact], strict=True):
        assert_close(actual, expected, 2e-2)


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
