"""``dora_row_norms`` against the norms of the rows of ``W + s·B A``, formed by hand in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from called_operators import Calls
from closeness import assert_close
from marks import needs_compiled
from torch import Tensor, nn

from gauge_ext.ops import dora_row_norms, reference

pytestmark = needs_compiled

SCALING = 0.7
DTYPES = [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 1e-6),
    (torch.float32, torch.float64, 1e-14),
    (torch.bfloat16, torch.float32, 1e-6),
    (torch.bfloat16, torch.bfloat16, 1e-6),
    (torch.float16, torch.float32, 1e-6),
]
# (out, in, r): tails of tiles and vectors, more than one piece of rows, several blocks of columns
SIZES = [(1, 1, 1), (37, 53, 5), (384, 384, 8), (3, 700, 70), (500, 130, 16), (5, 0, 2), (0, 5, 2)]


def problem(
    out: int,
    in_: int,
    rank: int,
    dtype: torch.dtype = torch.float64,
    factors: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out + in_)
    shapes = ((out, in_), dtype), ((rank, in_), factors), ((out, rank), factors)
    weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        for shape, kind in shapes
    )
    return weight, a, b


def by_hand(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = SCALING) -> Tensor:
    total = weight.double() + scaling * lora_B.double() @ lora_A.double()
    return torch.stack([row.square().sum().sqrt() for row in total]) if len(total) else total[:, 0]


@pytest.mark.parametrize(("dtype", "factors", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_norms_however_the_weight_lies(
    sizes: tuple[int, int, int], dtype: torch.dtype, factors: torch.dtype, tolerance: float
) -> None:
    weight, a, b = problem(*sizes, dtype, factors)
    expected = by_hand(weight, a, b)
    wide = torch.float64 if torch.float64 in (dtype, factors) else torch.float32
    layouts = {
        "rows": weight,
        "transposed": weight.mT.contiguous().mT,
        "rows apart": torch.cat([weight, weight + 7], 1)[:, : weight.shape[1]],
        "columns apart": weight.repeat_interleave(2, 1)[:, ::2],
        "part of one transposed": torch.cat([weight, weight + 7]).mT.contiguous().mT[: len(weight)],
    }
    for name, lying in layouts.items():
        norms = dora_row_norms(lying, a, b, SCALING)
        assert norms.dtype == wide, name
        assert norms.shape == expected.shape, name
        for actual, right in zip(norms.double(), expected, strict=True):
            assert abs(actual - right) <= tolerance * right, name
    turned = dora_row_norms(weight, a.mT.contiguous().mT, b.mT.contiguous().mT, SCALING)
    assert_close(turned, expected, tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_do_not_change_a_bit(transposed: bool) -> None:
    weight, a, b = problem(500, 600, 8, torch.float32, torch.float32)
    weight = weight.mT.contiguous().mT if transposed else weight
    several = dora_row_norms(weight, a, b, SCALING)
    torch.set_num_threads(1)
    assert torch.equal(dora_row_norms(weight, a, b, SCALING), several)


def test_rows_that_the_update_cancels_keep_their_norm() -> None:
    _, a, b = problem(8, 24, 3, torch.float32, torch.float32)
    weight = (-SCALING * b.double() @ a.double()).float()
    exact = by_hand(weight, a, b)  # what the rounding of W has left
    assert (exact < 1e-5).all()
    size = weight.double().norm(dim=1)
    norms = dora_row_norms(weight, a, b, SCALING)
    assert ((norms.double() - exact).abs() <= 1e-6 * size).all()
    zero = torch.zeros_like(weight)
    assert dora_row_norms(zero, a, torch.zeros_like(b), SCALING).tolist() == [0.0] * 8
    for form in (dora_row_norms, reference.dora_row_norms):
        assert form(weight, a, b, SCALING).isfinite().all()


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, a, b = problem(7, 9, 2)
    weight[2, 3], b[5, 1] = torch.inf, torch.nan
    norms = dora_row_norms(weight, a, b, SCALING)
    assert norms[2] == torch.inf
    assert norms[5].isnan()
    assert norms.isfinite().sum() == 5


def test_they_are_constants() -> None:
    weight, a, b = (t.requires_grad_() for t in problem(4, 6, 2))
    norms = dora_row_norms(weight, a, b, SCALING)
    assert not norms.requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
        norms = dora_row_norms(weight, dual, b, SCALING)
        assert torch.autograd.forward_ad.unpack_dual(norms).tangent is None
    plain = [t.detach() for t in (weight, a, b)]
    gradient = torch.func.grad(lambda a: dora_row_norms(plain[0], a, plain[2], SCALING).sum())
    assert not gradient(plain[1]).any()
    stacked = torch.stack([plain[1], -plain[1]])
    batched = torch.func.vmap(lambda a: dora_row_norms(plain[0], a, plain[2], SCALING))(stacked)
    assert_close(batched[1], by_hand(plain[0], -plain[1], plain[2]), 1e-13)


def test_opcheck() -> None:
    op = torch.ops.gauge_ext.dora_row_norms.default
    weight, a, b = problem(5, 4, 2)
    torch.library.opcheck(op, (weight, a, b, SCALING))
    torch.library.opcheck(op, (weight.mT.contiguous().mT, a, b, SCALING))
    torch.library.opcheck(op, (weight.bfloat16(), a.float(), b.float(), SCALING))
    # The others want an output to differentiate.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (weight, a.requires_grad_(), b, SCALING), test_utils=utils)


def test_one_operator_is_called() -> None:
    weight, a, b = problem(5, 4, 2, torch.float32, torch.float32)
    with Calls() as calls:
        dora_row_norms(weight, a, b, SCALING)
        dora_row_norms(nn.Parameter(weight), nn.Parameter(a), nn.Parameter(b), SCALING)
    assert calls.names == ["gauge_ext.dora_row_norms.default"] * 2


class Norms(nn.Module):
    """The op alone, on a weight as it lies in transformers' Conv1D."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        weight, a, b = problem(5, 4, 2, dtype, dtype)
        self.weight, self.lora_B = nn.Parameter(weight.mT.contiguous()), nn.Parameter(b)
        self.lora_A = a

    def forward(self, lora_A: Tensor) -> Tensor:
        return dora_row_norms(self.weight.mT, lora_A, self.lora_B, SCALING)


def test_compile_fullgraph() -> None:
    module = Norms(torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rank in (2, 2):
        a = module.lora_A[:rank].clone().requires_grad_()
        norms = compiled(a)
        assert not norms.requires_grad
        assert_close(norms.detach(), module(a), 1e-14)


def test_plain_onnx_export_and_jit_trace(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module, path = Norms(torch.float32).eval(), tmp_path / "norms.onnx"
    a = module.lora_A
    expected = by_hand(module.weight.detach().mT, a, module.lora_B.detach())
    torch.onnx.export(module, (a,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (norms,) = session.run(None, {session.get_inputs()[0].name: a.numpy()})
    np.testing.assert_allclose(norms, expected.numpy(), rtol=1e-5)
    traced = torch.jit.trace(module, (a,))
    assert "gauge_ext::" not in str(traced.graph)
    assert_close(traced(a).detach(), expected, 1e-5)


@pytest.mark.parametrize(("dtype", "factors", "tolerance"), DTYPES, ids=str)
def test_the_reference_agrees(dtype: torch.dtype, factors: torch.dtype, tolerance: float) -> None:
    weight, a, b = problem(37, 53, 5, dtype, factors)
    norms = reference.dora_row_norms(weight, a.requires_grad_(), b, SCALING)
    assert norms.dtype == dora_row_norms(weight, a, b, SCALING).dtype
    assert not norms.requires_grad
    assert_close(norms, by_hand(weight, a.detach(), b), 3 * tolerance)


def test_without_values() -> None:
    tensors = problem(4, 3, 2, torch.bfloat16, torch.float32)
    norms = dora_row_norms(*(t.to("meta") for t in tensors), SCALING)
    assert (norms.shape, norms.dtype, norms.is_meta) == ((4,), torch.float32, True)
    with pytest.raises(RuntimeError, match=r"some are on the meta device.*never loaded"):
        dora_row_norms(tensors[0], tensors[1].to("meta"), tensors[2], SCALING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight must have shape \[out, in\], got \[4\]"),
        ({"weight": torch.ones(4, 3, 2)}, r"of a convolution's weight, pass weight.flatten\(1\)"),
        ({"weight": torch.ones(4, 3).int()}, "weight must be floating-point, got Int"),
        (
            {"lora_A": torch.ones(2, 4)},
            r"lora_A must have shape \[r, in\] = \[\*, 3\], got \[2, 4\]",
        ),
        (
            {"lora_B": torch.ones(4, 1)},
            r"lora_B must have shape \[out, r\] = \[4, 2\], got \[4, 1\]",
        ),
        ({"lora_B": torch.ones(4, 2).int()}, "lora_B must be floating-point, got Int"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, Tensor], message: str) -> None:
    given = {"weight": torch.ones(4, 3), "lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    with pytest.raises(RuntimeError, match=message):
        dora_row_norms(**(given | change), scaling=SCALING)
