from __future__ import annotations

import numpy as np
import pytest
import torch

from gauge_ext.export.disk import numbers
from gauge_ext.export.disk.numbers import BFLOAT16, FLOAT16
from gauge_ext.export.patching import update


def test_every_bfloat16_there_and_back():
    bits = np.arange(2**16, dtype="<u2")
    wide = BFLOAT16.decode(bits)
    expected = torch.from_numpy(bits.view("i2").copy()).view(torch.bfloat16).float().numpy()
    assert np.array_equal(wide.view("u4"), expected.view("u4"))
    finite = np.isfinite(wide)
    assert np.array_equal(BFLOAT16.encode(wide[finite]), bits[finite])


@pytest.mark.parametrize(("number", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.half)])
def test_rounding_is_torchs(number, dtype):
    draw = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype="u4").view("f4")
    values = draw[np.abs(draw) < number.limit]
    halves = np.float32(1) + np.arange(-64, 64, dtype="f4") * np.float32(2**-9)  # ties
    values = np.concatenate([values, halves])
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view("u2")
    assert np.array_equal(number.encode(values.copy()).view("u2"), expected)


@pytest.mark.parametrize(("number", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.half)])
def test_the_limit_is_the_first_that_overflows(number, dtype):
    limit = torch.tensor(number.limit)
    below = torch.nextafter(limit, torch.tensor(0.0))
    assert limit.to(dtype).isinf()
    assert below.to(dtype).isfinite()


def test_the_tables_name_the_formats():
    assert {n.name for n in numbers.BY_ONNX.values()} == {
        n.name for n in numbers.BY_SAFETENSORS.values()
    }


@pytest.mark.parametrize("rank", [1, 16, 100, 2000])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 700), (70, 5000), (9, 20_000)])
def test_the_product_in_pieces(rows, columns, rank):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    out = np.full((rows, columns), np.nan)
    update.product(left, right, out)
    np.testing.assert_allclose(out, left @ right, rtol=1e-9, atol=1e-9)
