"""What is bound to a session once, what at each call, and what is let go after it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gauge_ext.export.adapters.bound import BoundAdapter


def open_graph(nodes, inputs, outputs, defaults=()) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(defaults))
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def scaled() -> onnxruntime.InferenceSession:
    """y = f x, z = f + x, where f has the default 1."""
    nodes = [helper.make_node("Mul", ["f", "x"], ["y"]), helper.make_node("Add", ["f", "x"], ["z"])]
    default = helper.make_tensor("f", TensorProto.FLOAT, [1], [1.0])
    inputs = [tensor("x", ["n"]), tensor("f", [1])]
    return open_graph(nodes, inputs, [tensor("y", ["n"]), tensor("z", ["n"])], [default])


class Counted:
    """onnxruntime's session, which counts the bindings that are asked of it."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.bindings = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.session, name)

    def io_binding(self) -> object:
        self.bindings += 1
        return self.session.io_binding()


X = np.array([1.0, 2.0], np.float32)


def test_the_factors_are_bound_once_and_where_they_lie(scaled):
    counted = Counted(scaled)
    factors = {"f": np.array([3.0], np.float32)}
    adapter = BoundAdapter(counted, factors)
    for x in (X, np.tile(X, 3), X):
        y, z = adapter.run(["y", "z"], {"x": x})
        np.testing.assert_array_equal(y, 3 * x)
        np.testing.assert_array_equal(z, 3 + x)
    assert counted.bindings == 1
    factors["f"][0] = 5.0
    (y,) = adapter.run(["y"], {"x": X})
    np.testing.assert_array_equal(y, 5 * X)


def test_what_is_not_bound_has_its_default(scaled):
    (y,) = BoundAdapter(scaled, {}).run(["y"], {"x": X})
    np.testing.assert_array_equal(y, X)


def test_outputs_are_the_callers_own(scaled):
    adapter = BoundAdapter(scaled, {"f": np.array([3.0], np.float32)})
    (first,) = adapter.run(["y"], {"x": X})
    (second,) = adapter.run(["y"], {"x": 10 * X})
    np.testing.assert_array_equal(first, 3 * X)
    np.testing.assert_array_equal(second, 30 * X)


def test_a_call_that_fails_spoils_none_that_follow(scaled):
    adapter = BoundAdapter(scaled, {"f": np.array([3.0], np.float32)})
    adapter.run(["y"], {"x": X})
    for wrong, words in ((X.astype(np.int64), "data type"), (X[None], "Invalid rank")):
        with pytest.raises(Exception, match=words):
            adapter.run(["y"], {"x": wrong})
    (y,) = adapter.run(["y"], {"x": X})
    np.testing.assert_array_equal(y, 3 * X)


def test_nothing_that_was_fed_is_kept(scaled):
    adapter = BoundAdapter(scaled, {"f": np.array([3.0], np.float32)})
    x = X.copy()
    seen = weakref.ref(x)
    adapter.run(["y"], {"x": x})
    del x
    gc.collect()
    assert seen() is None


def test_texts_are_fed():
    session = open_graph(
        [helper.make_node("Identity", ["t"], ["u"]), helper.make_node("Mul", ["f", "x"], ["y"])],
        [tensor("t", ["n"], TensorProto.STRING), tensor("x", ["n"]), tensor("f", [1])],
        [tensor("u", ["n"], TensorProto.STRING), tensor("y", ["n"])],
    )
    adapter = BoundAdapter(session, {"f": np.array([3.0], np.float32)})
    y, u = adapter.run(["y", "u"], {"x": X, "t": np.array(["a", "b"], object)})
    np.testing.assert_array_equal(y, 3 * X)
    assert u.tolist() == ["a", "b"]
