from __future__ import annotations

import pytest

from gauge_ext.export.trace.expressions import evaluate, names_in


@pytest.mark.parametrize(
    ("text", "value"),
    [("batch", 3), ("2*batch", 6), ("past + new", 12), ("(past - 1)//2", 3), ("7 % batch", 1)],
)
def test_arithmetic(text, value):
    sizes = {"batch": 3, "past": 7, "new": 5}
    assert evaluate(text, sizes) == value
    assert names_in(text) <= set(sizes)


@pytest.mark.parametrize(
    "text", ["batch +", "other", "batch**2", "__import__('os')", "max(batch, 1)", "1.5", "batch.x"]
)
def test_everything_else_is_refused(text):
    with pytest.raises(ValueError, match="is not"):
        evaluate(text, {"batch": 3})
