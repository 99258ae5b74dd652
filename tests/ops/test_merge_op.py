"""``merge_`` against W + s·B·A written out in float64, rounding by chance against probability."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import draw_seed, merge_, merge_into, reference

pytestmark = pytest.mark.skipif(
    not _load.status().compiled, reason="tests the compiled op; nothing compiled is loaded"
)

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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values(sizes: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    problem = weight, lora_A, lora_B = make(sizes, dtype, transposed)
    exact, delta = by_hand(problem, 0.7, transposed)
    before, size = weight.clone(), math.sqrt(sizes[2]) * 4
    out = torch.full_like(weight, 7)
    (sums,) = merge_into(out, weight, lora_A, lora_B, 0.7, transposed=transposed, fidelity=True)
    assert torch.equal(weight, before)
    assert_rounded(out, exact, size)
    (in_place,) = merge_(weight, lora_A, lora_B, 0.7, transposed=transposed)
    assert torch.equal(weight, out)
    assert sums.finite
    assert in_place.finite
    assert math.isnan(in_place.kept)
    kept = out.double() - before.double()
    expected = [delta.norm().item(), kept.norm().item(), (delta - kept).norm().item()]
    # In float32 what is lost is the float32 rounding, of which the oracle's delta knows more.
    loose = 1e-4 if dtype in NARROW else 1.0
    assert sums.delta == pytest.approx(expected[0], rel=1e-5)
    assert sums.kept == pytest.approx(expected[1], rel=1e-4)
    assert sums.lost == pytest.approx(expected[2], rel=loose, abs=1e-4 * expected[0])


def test_the_update_is_rounded_once_and_not_before_it_is_added() -> None:
    # 1 + 2^-9 + 2^-9 is 1 + 2^-8 in bfloat16 to one more bit: each part alone would round to 1.
    weight = torch.ones(4, 32, dtype=torch.bfloat16)
    lora_A, lora_B = torch.ones(3, 32), torch.full((4, 3), 2.0**-9)
    merge_(weight, lora_A, lora_B, 1.0)
    assert torch.equal(weight, torch.full((4, 32), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_many_weights_in_one_call() -> None:
    problems = [make(sizes, dtype) for sizes in SIZES for dtype in DTYPES]
    scalings = [0.1 * (1 + index) for index in range(len(problems))]
    expected = [by_hand(p, s)[0] for p, s in zip(problems, scalings, strict=True)]
    weights, a, b = (list(column) for column in zip(*problems, strict=True))
    sums = merge_(weights, a, b, scalings)
    assert len(sums) == len(problems)
    for weight, exact, scaling, lora in zip(weights, expected, scalings, a, strict=True):
        assert_rounded(weight, exact, 4 * max(1.0, scaling * math.sqrt(len(lora))))


def test_factors_of_another_dtype_are_widened_before_they_are_multiplied() -> None:
    weight, lora_A, lora_B = make((20, 24, 4), torch.float32)
    narrow = (weight, lora_A.bfloat16(), lora_B.bfloat16())
    exact, _ = by_hand(narrow, 2.0)
    merge_(*narrow, 2.0)
    assert_rounded(weight, exact, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_give_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    weight, lora_A, lora_B = make((50, 140, 6), dtype)
    seed = torch.tensor(-3) if dtype in NARROW else None
    whole = torch.empty_like(weight)
    merge_into(whole, weight, lora_A, lora_B, 0.3, seed=seed)
    for first in range(0, 50, 16):
        rows = slice(first, first + 16)
        merge_(weight[rows], lora_A, lora_B[rows], 0.3, seed=seed, first_row=first)
    assert torch.equal(weight, whole)


def test_columns_of_a_larger_weight_and_a_numpy_array() -> None:
    problem = weight, lora_A, lora_B = make((9, 40, 3), torch.float32)
    exact, _ = by_hand(problem, 1.0)
    wide = torch.zeros(9, 100)
    wide[:, 30:70] = weight
    merge_(wide[:, 30:70], lora_A, lora_B, 1.0)
    assert_rounded(wide[:, 30:70], exact, 8)
    assert not wide[:, :30].any()
    assert not wide[:, 70:].any()
    array = weight.numpy().copy()
    merge_(torch.from_numpy(array), lora_A, lora_B, 1.0)
    np.testing.assert_array_equal(array, wide[:, 30:70].numpy())


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


def test_threads_do_not_change_a_bit() -> None:
    weight, lora_A, lora_B = make((200, 300, 8), torch.bfloat16)
    seed, outs = torch.tensor(11), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(torch.empty_like(weight))
            merge_into(outs[-1], weight, lora_A, lora_B, 0.5, seed=seed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_without_a_compiled_build_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make((20, 150, 4), torch.bfloat16)
    outs = [torch.empty_like(problem[0]) for _ in range(2)]
    (compiled,) = merge_into(outs[0], *problem, 0.5, fidelity=True)
    monkeypatch.setattr(_load, "status", lambda: SimpleNamespace(compiled=False))
    (plain,) = merge_into(outs[1], *problem, 0.5, fidelity=True)
    torch.testing.assert_close(outs[0], outs[1], rtol=2**-7, atol=0)
    assert plain == pytest.approx(compiled, rel=1e-2)


def test_opcheck_and_the_version_counter() -> None:
    weight, lora_A, lora_B = make((6, 5, 2), torch.float32)
    ops = torch.ops.gauge_ext
    torch.library.opcheck(ops.merge_.default, ([weight], [lora_A], [lora_B], [0.5], [False]))
    out = torch.empty_like(weight)
    call = ([weight], [lora_A], [lora_B], [0.5], [False])
    torch.library.opcheck(ops.merge_out.default, call, {"out": [out]})
    version = weight._version
    merge_(weight, lora_A, lora_B, 0.5)
    assert weight._version == version + 1


def test_compile() -> None:
    def step(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        op = torch.ops.gauge_ext.merge_.default
        op([weight], [lora_A], [lora_B], [0.5], [False])
        return weight * 2

    problem = make((6, 5, 2), torch.float32)
    exact, _ = by_hand(problem, 0.5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_rounded(compiled(*problem), exact * 2, 16)
    assert_rounded(problem[0], exact, 8)


def test_a_parameter_is_merged_and_no_graph_is_kept() -> None:
    weight, lora_A, lora_B = make((6, 5, 2), torch.float32)
    parameter = torch.nn.Parameter(weight)
    merge_(parameter, lora_A.requires_grad_(), lora_B, 0.5)
    assert parameter.is_leaf
    assert parameter.grad_fn is None


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability: str) -> None:
    levels = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in levels or levels.index(capability.upper()) > levels.index(here):
        pytest.skip(f"this machine has {here} only")
    program = (
        "import sys, pytest\n"
        f"sys.exit(pytest.main([{__file__!r}, '-q', '-x', '-p', 'no:cacheprovider', "
        "'-k', 'values or chance or finite or bad_entry']))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight\[0\] must have shape \[out, in\], got \[3\].*flatten"),
        ({"weight": torch.ones(4, 3).T}, r"weight\[0\] must have its last dimension contiguous"),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, "float32, float64, bfloat16 or float16"),
        ({"lora_A": torch.ones(2, 5)}, r"lora_A\[0\] must have shape \[r, in\] = \[\*, 4\]"),
        ({"lora_B": torch.ones(3, 1)}, r"lora_B\[0\] must have shape \[out, r\] = \[3, 2\]"),
        ({"lora_A": torch.ones(2, 4).long()}, "the factors must be floating-point, got Long"),
        ({"lora_A": []}, "lora_A must have one entry for each of the 1 weights, got 0"),
        ({"scaling": [1.0, 2.0]}, "scaling must have one entry for each of the 1 weights, got 2"),
        (
            {"seed": torch.tensor(1)},
            "stochastic rounding, which is for bfloat16.*Float",
        ),
        ({"seed": torch.ones(2)}, "seed must be a 0-dim int64 tensor, got Float"),
        ({"first_row": -1}, "first_row must not be negative, got -1"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "weight": torch.ones(3, 4),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(3, 2),
        "scaling": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        merge_(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.ones(3, 5), r"out\[0\] must have the weight's shape and dtype"),
        (torch.ones(3, 4).bfloat16(), r"out\[0\] must have the weight's shape and dtype"),
    ],
)
def test_a_wrong_out_is_refused(out: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        merge_into(out, torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), 1.0)


def test_nothing_is_written_where_one_of_many_does_not_fit() -> None:
    first, wrong = torch.ones(3, 4), torch.ones(3, 5)
    a, b = torch.ones(2, 4), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=r"lora_A\[1\]"):
        merge_([first, wrong], [a, a], [b, b], 1.0)
    assert torch.equal(first, torch.ones(3, 4))
    overlapping = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="share no memory"):
        merge_into(overlapping[1:], overlapping[:3], a, b, 1.0)
