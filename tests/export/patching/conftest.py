"""What the tests of patching share."""

from __future__ import annotations

import pytest

from gauge_ext import _native
from gauge_ext.export.patching import update as update_module


@pytest.fixture(params=["compiled", "numpy"])
def few_rows(request, monkeypatch):
    """Blocks are changed in compiled code or in numpy; returns what sets rows for a chunk."""
    if request.param == "numpy":
        monkeypatch.setattr(_native, "load", lambda: None)
    elif _native.find().module is None:
        pytest.skip("nothing compiled is there")

    def set_rows(rows, *, decoded, stored):
        row = 4 * 4 * decoded if request.param == "numpy" else stored // 4
        monkeypatch.setattr(update_module, "CHUNK", rows * row)

    return set_rows
