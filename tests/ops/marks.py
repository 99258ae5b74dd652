"""What tests of ops cannot do without."""

from __future__ import annotations

import pytest

from gauge_ext import _load

needs_compiled = pytest.mark.skipif(
    not _load.status().compiled, reason="tests the compiled op; nothing compiled is loaded"
)
