"""The compiled loops against the formulas in numpy, row by row and block by block."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gauge_ext import _native
from gauge_ext.export.disk.numbers import BFLOAT16, FLOAT16, FLOAT32
from gauge_ext.export.patching.block_rounding import Sums, change_rows, change_rows_in_numpy
from gauge_ext.export.patching.nbits import Quantized
from gauge_ext.export.patching.sites import Blocks
from gauge_ext.export.patching.update import LowRank

NATIVE = _native.find().module
pytestmark = pytest.mark.skipif(NATIVE is None, reason="nothing compiled is there to compare")

NUMBERS = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}


def problem(
    bits: int,
    size: int,
    columns: int,
    rank: int,
    *,
    number: str = "float32",
    zeros: str = "codes",
    dora: bool = False,
    rows: int = 21,
) -> tuple[Quantized, LowRank, list[np.ndarray]]:
    """A weight of random codes, an update of about a step, and the bytes of all rows."""
    rng = np.random.default_rng([bits, size, columns, rank])
    zero_type = {"none": None, "codes": 2, "numbers": ONNX_TYPES[number]}[zeros]
    blocks = Blocks(bits, size, rows, columns, "scales", zeros, None)
    parts: list[Any] = [
        None if kind is None else SimpleNamespace(data_type=kind)
        for kind in (2, ONNX_TYPES[number], zero_type)
    ]
    weight = Quantized(blocks, *parts, NUMBERS[number])
    n, top = weight.count, 2**bits
    scales = rng.uniform(0.01, 0.03, (rows, n)) * rng.choice([1, 1, -1], (rows, n))
    scales[0, 0] = 0
    raw = [
        rng.integers(0, 256, (rows, weight.row_bytes[0]), "u1"),
        weight.number.encode(scales.astype("f4")).view("u1"),
    ]
    if zeros == "codes":
        raw.append(rng.integers(0, 256, (rows, weight.row_bytes[2]), "u1"))
    elif zeros == "numbers":
        middle = rng.uniform(0.3, 0.7, (rows, n)) * top
        raw.append(weight.number.encode(middle.astype("f4")).view("u1"))
    left = rng.standard_normal((rows, rank)).astype("f4")
    right = (0.02 * rng.standard_normal((rank, columns)) / rank**0.5).astype("f4")
    magnitude = rng.uniform(1, 3, rows) if dora else None
    return weight, LowRank(left, right, magnitude), raw


def both(
    weight: Quantized, update: LowRank, raw: list[np.ndarray]
) -> tuple[tuple[Sums, list[np.ndarray]], tuple[Sums, list[np.ndarray]]]:
    """Sums and bytes by numpy and by the compiled loops; the first two rows are another chunk's."""
    by_numpy, compiled = ([part[2:].copy() for part in raw] for _ in range(2))
    expected = change_rows_in_numpy(weight, update, by_numpy, 2)
    assert NATIVE is not None
    got = change_rows(NATIVE, weight, update, compiled, 2)
    return (expected, by_numpy), (got, compiled)


def assert_same(weight: Quantized, update: LowRank, raw: list[np.ndarray]) -> None:
    (expected, by_numpy), (got, compiled) = both(weight, update, raw)
    assert got.finite
    for name in ("error", "moved", "total"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    for one, other in zip(weight.decode(by_numpy)[1:], weight.decode(compiled)[1:], strict=True):
        # Of the last digits, where sums in another order put a block's end elsewhere.
        last = {"float32": 2**-21, "float16": 2**-10, "bfloat16": 2**-7}[weight.number.name]
        np.testing.assert_allclose(other, one, rtol=last)
        assert np.mean(one != other) < 0.2
    codes, others = (weight.decode(parts)[0].astype(int) for parts in (by_numpy, compiled))
    assert np.abs(codes - others).max() <= 1
    assert np.mean(codes != others) < 2e-3
    if weight.packed and weight.count * weight.blocks.bits % 8:
        assert not (compiled[2][:, -1] >> 4).any()  # the half of a byte that no block has


@pytest.mark.parametrize("zeros", ["none", "codes", "numbers"])
@pytest.mark.parametrize("number", list(NUMBERS))
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_and_numpy_agree(bits, size, number, zeros):
    for columns, rank, dora in ((9 * size, 1, False), (19 * size - 7, 5, False), (511, 16, True)):
        assert_same(*problem(bits, size, columns, rank, number=number, zeros=zeros, dora=dora))


@pytest.mark.parametrize("rank", [2, 3, 8, 33, 64])
def test_every_rank(rank):
    assert_same(*problem(4, 32, 8 * 32 * 4, rank, rows=64))


def test_an_update_of_zeros_changes_nothing():
    weight, update, raw = problem(4, 32, 17 * 32, 4)
    raw[1].view("f4")[0, 0] = 0.01
    raw[2][:, -1] &= 15  # of 17 zero points the 18th is padding
    _, (got, compiled) = both(weight, LowRank(0 * update.left, update.right), raw)
    assert (got.error, got.moved) == (0, 0)
    for part, before in zip(compiled, raw, strict=True):
        assert np.array_equal(part, before[2:])


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_what_is_not_finite_is_told_by_both(spoil):
    for dora in (False, True):
        weight, update, raw = problem(8, 16, 100, 3, dora=dora)
        update.right[1, 77] = spoil
        (expected, _), (got, _) = both(weight, update, raw)
        assert not expected.finite
        assert not got.finite


_ELSEWHERE = """
import sys, numpy as np
from gauge_ext import _native
held = dict(np.load(sys.argv[1]))
sums = _native.load().requantize_rows(
    **held, magnitude=None, bits=4, block_size=32, scale_format="float32", packed_zero_points=True
)
assert "torch" not in sys.modules
np.savez(sys.argv[2], sums=sums, **held)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets_agree(capability, tmp_path):
    weight, update, raw = problem(4, 32, 700, 6)
    named = dict(zip(("codes", "scales", "zero_points"), raw, strict=True))
    np.savez(tmp_path / "in.npz", left=update.left, right=update.right, **named)
    subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, tmp_path / "in.npz", tmp_path / "out.npz"],
        check=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert NATIVE is not None
    got = np.load(tmp_path / "out.npz")
    sums = change_rows(NATIVE, weight, update, raw, 0)
    assert got["sums"][:3] == pytest.approx([sums.error, sums.moved, sums.total], rel=1e-5)
    codes, others = (weight.decode(list(p))[0].astype(int) for p in (raw, [got[k] for k in named]))
    assert np.abs(codes - others).max() <= 1
    assert np.mean(codes != others) < 2e-3


def fitting_arguments() -> dict[str, Any]:
    _, update, raw = problem(4, 32, 128, 3)
    return {
        **dict(zip(("codes", "scales", "zero_points"), raw, strict=True)),
        "left": update.left,
        "right": update.right,
        "magnitude": None,
        "bits": 4,
        "block_size": 32,
        "scale_format": "float32",
        "packed_zero_points": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"block_size": 24}, "block_size must be a power of two, at least 16, got 24"),
        ({"scale_format": "float64"}, "scale_format must be float32, float16 or bfloat16"),
        ({"codes": np.zeros(5, "u1")}, "codes must have 1344 bytes, got 5"),
        ({"scales": np.zeros(5, "u1")}, "scales must have 336 bytes, got 5"),
        ({"zero_points": np.zeros(5, "u1")}, "zero_points must have 42 bytes, got 5"),
        ({"left": np.zeros((21, 2))}, "left must have 2 axes of 'f', got 2 of 'd'"),
        ({"left": np.zeros((21, 2), "f4")}, r"left and right must be \(rows, r\)"),
        ({"magnitude": np.zeros(3)}, "magnitude must have 21 entries, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fitting = fitting_arguments()
    assert NATIVE is not None
    NATIVE.requantize_rows(**fitting)
    with pytest.raises(ValueError, match=message):
        NATIVE.requantize_rows(**{**fitting, **change})


def test_what_cannot_be_written_is_refused():
    fitting = fitting_arguments()
    fitting["codes"].flags.writeable = False
    assert NATIVE is not None
    with pytest.raises(ValueError, match="read-only"):
        NATIVE.requantize_rows(**fitting)
