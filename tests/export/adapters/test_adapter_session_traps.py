"""Each of onnxruntime's silent traps, and what a session says in its place."""

from __future__ import annotations

import gc

import numpy as np
import onnxruntime
import pytest
from two_adapters import SCALES

from gauge_ext.errors import ConfigError


class TestTraps:
    def test_onnxruntime_itself_is_silent(self, made, x):
        """What the session is for: these are not refused, and give wrong numbers."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        raw = onnxruntime.InferenceSession(str(made.graph), options)
        run_options = onnxruntime.RunOptions()
        loaded = []
        for name in SCALES:
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(made.folder / f"{name}.onnx_adapter"))
            run_options.add_active_adapter(adapter)
            loaded.append(adapter)
        both = raw.run(["y"], {"x": x}, run_options)[0]
        np.testing.assert_allclose(both, made.expected({"a": 1.0}, x), atol=1e-5)

    def test_several_adapters_at_once(self, session, x):
        with pytest.raises(ConfigError, match="4 rows.*'a': 0.5"):
            session.run({"x": x}, ["a", "b"])

    def test_a_feed_of_an_adapters_name(self, session, x):
        feeds = {"x": x, "up.lora_A": np.zeros((6, 1), np.float32)}
        for adapter in ("a", None):
            with pytest.raises(ConfigError, match="up.lora_A"):
                session.run(feeds, adapter)

    @pytest.mark.parametrize("method", ["run_with_iobinding", "run_async"])
    def test_calls_that_overlook_adapters(self, method, session):
        with pytest.raises(ConfigError, match="overlooks"):
            getattr(session, method)(None)

    def test_an_adapter_that_python_would_have_collected(self, session, made, x):
        arrays = {"up.lora_A": np.ones((6, 1)), "up.lora_B": np.ones((1, 10))}
        session.add("c", {name: array.astype(np.float32) for name, array in arrays.items()})
        first = session.run({"x": x}, "c")["y"].copy()
        held = session.run({"x": x}, "c")["y"]
        del arrays
        gc.collect()
        junk = [np.full((6, 1), 7, np.float32) for _ in range(2000)]
        np.testing.assert_array_equal(session.run({"x": x}, "c")["y"], first)
        np.testing.assert_array_equal(held, first)
        assert len(junk) == 2000

    def test_a_removed_adapter(self, session, x):
        session.run({"x": x}, {"a": 1.0, "b": 1.0})
        session.remove("a")
        for choice in ("a", {"a": 1.0, "b": 1.0}, [None, "a", "b", "b"]):
            with pytest.raises(ConfigError, match="no adapter 'a'; there are 'b'"):
                session.run({"x": x}, choice, outputs=["y"])
        with pytest.raises(ConfigError, match="no adapter 'a'"):
            session.remove("a")
