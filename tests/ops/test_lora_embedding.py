"""``lora_embedding`` against the summed table ``W + s·(B A)ᵀ`` in float64, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from called_operators import Calls
from closeness import assert_close
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import lora_embedding, reference

pytestmark = needs_compiled

VOCAB, DIM, SCALING = 23, 37, 0.7
DTYPES = [
    (torch.float64, torch.float64, 1e-13),
    (torch.float64, torch.float32, 1e-6),
    (torch.float32, torch.float32, 3e-6),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
]
IDS = {
    "one": [4],
    "some twice": [3, 0, 22, 3, 3, 1],
    "many": [(7 * i * i) % VOCAB for i in range(301)],  # several pieces, and a tail
    "none": [],
}


class Problem:
    def __init__(
        self,
        ids: Sequence[int],
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        rank: int = 5,
        sizes: tuple[int, int] = (VOCAB, DIM),
    ) -> None:
        generator = torch.Generator().manual_seed(len(ids))
        vocab, dim = sizes

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.ids = torch.tensor(ids, dtype=torch.int64)
        self.weight = normal(vocab, dim, dtype=dtype)
        self.lora_A = normal(rank, vocab, dtype=factors or dtype).requires_grad_()
        self.lora_B = normal(dim, rank, dtype=factors or dtype).requires_grad_()
        self.grad = normal(len(ids), dim, dtype=dtype)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def run(self, padding_idx: int | None = None) -> Tensor:
        return lora_embedding(self.ids, self.weight, *self.leaves, SCALING, padding_idx)

    def by_hand(self, padding_idx: int | None = None) -> list[Tensor]:
        """Return y and both gradients."""
        a, b = (t.detach().double() for t in self.leaves)
        table, grad = self.weight.double() + SCALING * (b @ a).T, self.grad.double()
        grad_A, grad_B = torch.zeros_like(a), torch.zeros_like(b)
        for token, given in zip(self.ids.tolist(), grad, strict=True):
            if token != padding_idx:
                grad_A[:, token] += SCALING * b.T @ given
            grad_B += SCALING * torch.outer(given, a[:, token])
        return [table[self.ids], grad_A, grad_B]


@pytest.mark.parametrize(("dtype", "factors", "tolerance"), DTYPES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_values_and_gradients(
    ids: list[int], dtype: torch.dtype, factors: torch.dtype, tolerance: float, rank: int
) -> None:
    p = Problem(ids, dtype, factors, rank)
    y = p.run()
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, p.leaves, p.grad)
    assert [g.dtype for g in gradients] == [factors, factors]
    for actual, expected in zip((y, *gradients), p.by_hand(), strict=True):
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("padding_idx", [0, 3])
def test_the_padding_token_gives_its_row_and_gets_no_gradient(padding_idx: int) -> None:
    p = Problem([3, 0, 22, 3, 0])
    y = p.run(padding_idx)
    gradients = torch.autograd.grad(y, p.leaves, p.grad)
    assert not gradients[0][:, padding_idx].any()
    for actual, expected in zip((y, *gradients), p.by_hand(padding_idx), strict=True):
        assert_close(actual, expected, 1e-13)
    exact = torch.autograd.grad(p.run(padding_idx), p.leaves, p.grad, create_graph=True)
    for actual, same in zip(exact, gradients, strict=True):
        assert_close(actual, same, 1e-13)


def test_any_shape_of_ids_int32_and_strides() -> None:
    p = Problem([5, 1, 1, 9, 0, 22])
    expected = p.by_hand()[0]
    ids = p.ids.view(3, 2).T
    y = lora_embedding(ids, p.weight, *p.leaves, SCALING)
    assert_close(y.transpose(0, 1).reshape(6, DIM), expected, 1e-13)
    assert_close(lora_embedding(p.ids.int(), p.weight, *p.leaves, SCALING), expected, 1e-13)
    assert lora_embedding(torch.tensor(5), p.weight, *p.leaves, SCALING).shape == (DIM,)
    wide = torch.cat([p.weight, p.weight], 1)[:, :DIM]
    a, b = (t.detach().T.contiguous().T for t in p.leaves)
    for weight in (wide, p.weight.T.contiguous().T):
        assert_close(lora_embedding(p.ids, weight, a, b, SCALING), expected, 1e-13)
    a.requires_grad_()
    strided = lora_embedding(p.ids, wide, a, b, SCALING)
    (grad_A,) = torch.autograd.grad(strided, a, p.grad.T.contiguous().T)
    assert_close(grad_A, p.by_hand()[1], 1e-13)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_wanted(wanted: int) -> None:
    p = Problem([2, 2, 7])
    p.leaves[1 - wanted].requires_grad_(False)
    (actual,) = torch.autograd.grad(p.run(), p.leaves[wanted], p.grad)
    assert_close(actual, p.by_hand()[1 + wanted], 1e-13)


def test_a_table_that_is_trained_gets_its_gradient() -> None:
    p = Problem([2, 2, 7])
    p.weight.requires_grad_()
    (actual,) = torch.autograd.grad(p.run(), p.weight, p.grad)
    assert_close(actual, torch.zeros_like(actual).index_add(0, p.ids, p.grad), 1e-13)


def test_gradcheck_to_second_order() -> None:
    p = Problem([2, 0, 2, 4], rank=2, sizes=(5, 3))

    def function(*factors: Tensor) -> Tensor:
        return lora_embedding(p.ids, p.weight, *factors, SCALING)

    assert torch.autograd.gradcheck(function, p.leaves)
    assert torch.autograd.gradgradcheck(function, p.leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    p = Problem([2, 0, 2], dtype, rank=2, sizes=(5, 3))
    ops = torch.ops.gauge_ext
    call = (p.ids, p.weight, *p.leaves, SCALING, 1)
    torch.library.opcheck(ops.lora_embedding.default, call)
    backward = (p.grad, p.ids, *(t.detach() for t in p.leaves), SCALING, None)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.lora_embedding_backward.default, (*backward, *needs))


def test_the_same_bits_each_time_and_of_A_for_any_number_of_threads() -> None:
    p = Problem([i % 7 for i in range(4000)], torch.float32, rank=8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(p.run(), p.leaves, p.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][0], others[0]) for others in found[1:])
    assert torch.equal(found[1][1], found[2][1])
    for gradients in found:
        assert_close(gradients[1], p.by_hand()[2], 1e-5)


def test_one_op_and_nothing_saved_but_ids() -> None:
    p = Problem([0, 1, 2], torch.float32)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Calls() as calls:
        p.run()
    factors = {t.data_ptr() for t in p.leaves}
    assert [t.data_ptr() for t in saved if t.data_ptr() not in factors] == [p.ids.data_ptr()]
    assert calls.names == ["gauge_ext.lora_embedding.default"]


def test_autocast_leaves_the_table_and_the_factors() -> None:
    p = Problem([3, 0, 1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = p.run()
    assert y.dtype == torch.float32
    for actual, expected in zip(
        (y, *torch.autograd.grad(y, p.leaves, p.grad)), p.by_hand(), strict=True
    ):
        assert_close(actual, expected, 3e-6)


class Layer(nn.Module):
    """A layer as a stranger would write it, on the op alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        p = Problem([0], dtype, rank=2, sizes=(9, 4))
        self.weight = nn.Parameter(p.weight, requires_grad=False)
        self.lora_A, self.lora_B = (nn.Parameter(t.detach()) for t in p.leaves)

    def forward(self, ids: Tensor) -> Tensor:
        return lora_embedding(ids, self.weight, self.lora_A, self.lora_B, SCALING, 3)

    def by_hand(self, ids: Tensor) -> Tensor:
        return (self.weight + SCALING * (self.lora_B @ self.lora_A).T)[ids]


def batch(rows: int) -> Tensor:
    ids = torch.randint(8, (rows, 2), generator=torch.Generator().manual_seed(rows))
    return ids + (ids >= 3)  # without the padding token, whose gradient is not the formula's


def test_compile_fullgraph_forward_and_backward() -> None:
    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    factors = (layer.lora_A, layer.lora_B)
    for rows in (3, 7, 11):  # the third size must be served by a graph with symbolic sizes
        y, expected = compiled(batch(rows)), layer.by_hand(batch(rows))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), factors),
            torch.autograd.grad(expected.square().sum(), factors),
        )


def test_plain_onnx_export(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, path = Layer(torch.float32).eval(), tmp_path / "layer.onnx"
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(layer, (batch(3),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: batch(9).numpy()})
    np.testing.assert_allclose(y, layer.by_hand(batch(9)).detach().numpy(), atol=1e-5)


def test_jit_trace_and_torch_func() -> None:
    layer, ids = Layer(), batch(9)
    traced = torch.jit.trace(layer, (batch(3),))
    assert "gauge_ext::" not in str(traced.graph)
    torch.testing.assert_close(traced(ids), layer.by_hand(ids))

    def loss(run: Callable[..., Tensor], a: Tensor) -> Tensor:
        return run(ids, layer.weight, a, layer.lora_B, SCALING).square().sum()

    actual = torch.func.grad(lambda a: loss(lora_embedding, a))(layer.lora_A)
    (expected,) = torch.autograd.grad(layer.by_hand(ids).square().sum(), layer.lora_A)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.func.vmap(layer)(ids), layer.by_hand(ids))


def test_the_reference_agrees() -> None:
    p = Problem([2, 0, 22, 2])
    y = reference.lora_embedding(p.ids, p.weight, *p.leaves, SCALING, 0)
    for actual, expected in zip(
        (y, *torch.autograd.grad(y, p.leaves, p.grad)), p.by_hand(0), strict=True
    ):
        assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight must have shape \[vocab, dim\], got \[3\]"),
        ({"lora_A": torch.ones(2, 5)}, r"lora_A must have shape \[r, vocab\] = \[\*, 4\].*\[2, 5"),
        ({"lora_B": torch.ones(3, 1)}, r"lora_B must have shape \[dim, r\] = \[3, 2\], got \[3, 1"),
        ({"lora_A": torch.ones(2, 4).double()}, r"lora_A must have weight's dtype, Float"),
        ({"lora_B": torch.ones(3, 2).double()}, r"lora_B must have lora_A's dtype, Float"),
        ({"ids": torch.ones(2)}, "ids must be int64 or int32, got Float"),
        ({"padding_idx": 4}, r"padding_idx must be in \[0, 4\) or None, got 4"),
        (
            {
                n: torch.ones(s).half()
                for n, s in (("weight", (4, 3)), ("lora_A", (2, 4)), ("lora_B", (3, 2)))
            },
            "weight must be float32, float64 or bfloat16 on the CPU, got Half",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "ids": torch.tensor([0, 3]),
        "weight": torch.ones(4, 3),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(3, 2),
        "scaling": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        lora_embedding(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_that_is_not_in_the_table(token: int) -> None:
    p = Problem([2, token])
    with pytest.raises(IndexError, match=rf"ids must be in \[0, {VOCAB}\).*got {token}"):
        p.run()
