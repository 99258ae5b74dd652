"""``merge_`` against W + s·B·A written out in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from marks import needs_compiled
from merge_problems import DTYPES, NARROW, SIZES, assert_rounded, by_hand, make
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import merge_, merge_into

pytestmark = needs_compiled


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
    files = [__file__, str(Path(__file__).with_name("test_merge_op_rounding.py"))]
    program = (
        "import sys, pytest\n"
        f"sys.exit(pytest.main([*{files}, '-q', '-x', '-p', 'no:cacheprovider', "
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
