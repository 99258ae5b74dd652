"""What the tests of adapters beside a graph share."""

from __future__ import annotations

import numpy as np
import pytest
from two_adapters import SCALES, Made

from gauge_ext.export import AdapterSession


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """The graph, once for a file of tests."""
    return Made(tmp_path_factory.mktemp("session"))


@pytest.fixture
def session(made) -> AdapterSession:
    """The form whose adapters are optional, with both adapters, from their files."""
    return AdapterSession(
        made.graph, {name: made.folder / f"{name}.onnx_adapter" for name in SCALES}
    )


@pytest.fixture
def x() -> np.ndarray:
    """Four sequences of five steps."""
    return np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
