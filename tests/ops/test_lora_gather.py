"""``lora_gather`` against a loop over the adapters in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import lora_gather, reference

pytestmark = needs_compiled

DTYPES = [
    (torch.float64, torch.float64, 1e-13),
    (torch.float32, torch.float32, 3e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
]
RANKS = (4, 1, 9, 3)
SCALING = (0.5, -1.0, 0.25, 2.0)
INDICES = {
    "each its own": [0, 1, 2, 3],
    "unsorted, with none": [2, -1, 0, 2, -1, 3, 0, 0, 2],
    "none at all": [-1, -1, -1],
    "one for many": [1] * 300,  # several tasks
    "many for each": [i % 4 for i in range(301)],
    "no row": [],
}


class Problem:
    def __init__(
        self,
        index: Sequence[int],
        sizes: tuple[int, int] = (37, 51),
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        batch: tuple[int, ...] = (),
    ) -> None:
        generator = torch.Generator().manual_seed(len(index))
        inner, out = sizes

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.index = torch.tensor(index, dtype=torch.int64)
        self.x = normal(len(index), *batch, inner, dtype=dtype).requires_grad_()
        self.weight = normal(out, inner, dtype=dtype)
        self.bias = normal(out, dtype=dtype)
        narrow = factors or dtype
        self.lora_A = [normal(r, inner, dtype=narrow).requires_grad_() for r in RANKS]
        self.lora_B = [normal(out, r, dtype=narrow).requires_grad_() for r in RANKS]
        self.grad = normal(len(index), *batch, out, dtype=dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.lora_A, *self.lora_B]

    def run(self) -> Tensor:
        return lora_gather(
            self.x, self.weight, self.bias, self.lora_A, self.lora_B, SCALING, self.index
        )

    def by_hand(self) -> list[Tensor]:
        """Return y and every gradient, adapter by adapter in float64."""
        x, weight, bias, grad = (
            t.detach().double() for t in (self.x, self.weight, self.bias, self.grad)
        )
        a = [t.detach().double() for t in self.lora_A]
        b = [t.detach().double() for t in self.lora_B]
        y, grad_x = x @ weight.T + bias, grad @ weight
        grads_A, grads_B = [torch.zeros_like(t) for t in a], [torch.zeros_like(t) for t in b]
        for i in set(self.index.tolist()) - {-1}:
            own = self.index == i
            rows, given = x[own].reshape(-1, x.shape[-1]), grad[own].reshape(-1, grad.shape[-1])
            delta = SCALING[i] * b[i] @ a[i]
            y[own] += x[own] @ delta.T
            grad_x[own] += grad[own] @ delta
            grads_A[i] = SCALING[i] * b[i].T @ given.T @ rows
            grads_B[i] = SCALING[i] * given.T @ rows @ a[i].T
        return [y, grad_x, *grads_A, *grads_B]


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


class Layer(nn.Module):
    """A layer as a stranger would write it, on the op alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = Problem([0], sizes=(4, 5), dtype=dtype)
        self.weight, self.bias = nn.Parameter(p.weight, False), nn.Parameter(p.bias, False)
        self.lora_A = nn.ParameterList([t.detach() for t in p.lora_A])
        self.lora_B = nn.ParameterList([t.detach() for t in p.lora_B])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        lora = (list(self.lora_A), list(self.lora_B), SCALING)
        return lora_gather(x, self.weight, self.bias, *lora, index)

    def by_hand(self, x: Tensor, index: Tensor) -> Tensor:
        rows = []
        for row, i in zip(x, index.tolist(), strict=True):
            merged = self.weight
            if i >= 0:
                merged = merged + SCALING[i] * self.lora_B[i] @ self.lora_A[i]
            rows.append(row @ merged.T + self.bias)
        return torch.stack(rows)


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    return x, torch.randint(-1, 4, (rows,), generator=generator)


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    factors = [*layer.lora_A, *layer.lora_B]
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        x, index = batch(rows)
        y, expected = compiled(x, index), layer.by_hand(x, index)
        torch.testing.assert_close(y, expected)
        exact = torch.autograd.grad(expected.square().sum(), factors, allow_unused=True)
        for actual, wanted in zip(
            torch.autograd.grad(y.square().sum(), factors), exact, strict=True
        ):
            torch.testing.assert_close(
                actual, torch.zeros_like(actual) if wanted is None else wanted
            )


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = Layer(torch.float32).eval()
    path = tmp_path / "layer.onnx"
    rows = torch.export.Dim.DYNAMIC
    example = batch(3, torch.float32)
    dynamic = ({0: rows}, {0: rows})
    torch.onnx.export(layer, example, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, index = batch(9, torch.float32)
    names = [entry.name for entry in session.get_inputs()]
    (y,) = session.run(None, dict(zip(names, (x.numpy(), index.numpy()), strict=True)))
    np.testing.assert_allclose(y, layer.by_hand(x, index).detach().numpy(), atol=1e-5)


def test_jit_trace_and_torch_func() -> None:
    layer = Layer()
    traced = torch.jit.trace(layer, batch(3))
    assert "gauge_ext::" not in str(traced.graph)
    x, index = batch(9)
    torch.testing.assert_close(traced(x, index), layer.by_hand(x, index))
    actual = torch.func.grad(lambda rows: layer(rows, index).square().sum())(x)
    expected = torch.func.grad(lambda rows: layer.by_hand(rows, index).square().sum())(x)
    torch.testing.assert_close(actual, expected)
    _, tangent = torch.func.jvp(lambda rows: layer(rows, index), (x,), (x,))
    torch.testing.assert_close(tangent, layer.by_hand(x, index) - layer.bias)
    batched = torch.func.vmap(layer)(x.view(3, 3, 4), index.view(3, 3))
    torch.testing.assert_close(batched.view(9, 5), layer.by_hand(x, index))


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
def test_wrong_arguments_say_what_was_expected(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(2, 4),
        "weight": torch.ones(3, 4),
        "bias": torch.ones(3),
        "lora_A": [torch.ones(2, 4)],
        "lora_B": [torch.ones(3, 2)],
        "scaling": [1.0],
        "index": torch.tensor([0, -1]),
    }
    with pytest.raises(RuntimeError, match=message):
        lora_gather(**(arguments | change))  # type: ignore[arg-type]
