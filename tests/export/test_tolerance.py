from __future__ import annotations

import pytest
import torch

from gauge_ext.errors import ConfigError
from gauge_ext.export import Tolerance


def test_narrower_dtypes_have_wider_bars():
    bars = [Tolerance.for_dtype(d) for d in (torch.float64, torch.float32, torch.float16)]
    assert [bar.relative for bar in bars] == sorted(bar.relative for bar in bars)
    for dtype, bar in zip((torch.float64, torch.float32, torch.float16), bars, strict=True):
        assert torch.finfo(dtype).eps < bar.relative
    assert bars[1].limit(1.0) <= 1.1e-4 * (1 + 1e-12)


def test_the_limit_grows_with_the_output():
    bar = Tolerance(absolute=0.5, relative=0.25)
    assert bar.limit(0.0) == 0.5
    assert bar.limit(8.0) == 2.5


def test_one_number_for_everything():
    assert Tolerance.within(0.01) == Tolerance(0.01, 0.01, 0.99)
    assert Tolerance.within(5.0).cosine == -1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("absolute", -1e-9),
        ("absolute", float("nan")),
        ("relative", float("inf")),
        ("cosine", 1.1),
        ("top1", -0.1),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"tolerance: {name} must be a number in"):
        Tolerance(**{name: value})
