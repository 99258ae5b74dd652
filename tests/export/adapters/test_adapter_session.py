"""One base, many adapters: switching, mixing, rows, threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from two_adapters import SCALES

from gauge_ext.export import AdapterSession, export_onnx, write_onnx_adapter

ROOT = Path(__file__).parents[3]


def test_each_call_has_its_adapter(session, made, x):
    assert session.adapters == ("a", "b")
    plain = session.run({"x": x})["y"]
    np.testing.assert_allclose(plain, made.expected({}, x), atol=1e-5)
    for _ in range(2):
        for name in SCALES:
            found = session.run({"x": x}, adapter=name)
            np.testing.assert_allclose(found["y"], made.expected({name: 1.0}, x), atol=1e-5)
            assert np.abs(found["y"] - plain).max() > 0.1
        np.testing.assert_array_equal(session.run({"x": x})["y"], plain)
    assert set(session.run({"x": x}, "a", outputs=["mean"])) == {"mean"}


@pytest.mark.parametrize("form", ["optional", "required"])
def test_both_forms_take_every_kind_of_source(form, made, x):
    session = AdapterSession(made.folder / f"{form}.onnx", {"folder": made.folder / "a"})
    tensors = made.folder / f"{form}.safetensors"
    write_onnx_adapter(made.folder / "a", made.folder / f"{form}.onnx", tensors)
    session.add("tensors", tensors)
    session.add("file", made.folder / "a.onnx_adapter")
    arrays = {}
    for layer, (a, b) in made.factors["a"].items():
        arrays |= {f"{layer}.lora_A": a.T.numpy(), f"{layer}.lora_B": SCALES["a"] * b.T.numpy()}
    session.add("arrays", arrays)
    expected = made.expected({"a": 1.0}, x)
    for name in session.adapters:
        np.testing.assert_allclose(session.run({"x": x}, name)["y"], expected, atol=1e-5)
    np.testing.assert_allclose(session.run({"x": x})["y"], made.expected({}, x), atol=1e-5)


def test_mixtures_are_exact_sums(session, made, x):
    weights = {"a": 0.75, "b": -1.25}
    expected = made.expected(weights, x)
    np.testing.assert_allclose(session.run({"x": x}, weights)["y"], expected, atol=1e-5)
    again = session.run({"x": x}, dict(reversed(weights.items())))["y"]
    np.testing.assert_allclose(again, expected, atol=1e-5)
    for step in range(20):  # more than are kept
        weights = {"a": step / 10, "b": 1.0}
        found = session.run({"x": x}, weights)["y"]
        np.testing.assert_allclose(found, made.expected(weights, x), atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_mixtures_of_narrow_factors(precision, made, x, tmp_path):
    graph = tmp_path / "narrow.onnx"
    export_onnx(
        made.base,
        (torch.randn(2, 5, 6),),
        graph,
        dynamic_shapes=({0: "batch", 1: "steps"},),
        mode="adapters",
        adapter_targets="all-linear",
        adapter_precision=precision,
        validate=False,
    )
    session = AdapterSession(graph, {name: made.folder / name for name in SCALES})
    weights = {"a": 0.5, "b": -2.0}
    found, expected = session.run({"x": x}, weights)["y"], made.expected(weights, x)
    rounding = 0.1 if precision == "int8" else 1e-2
    assert 1e-6 < np.abs(found - expected).max() < rounding * np.abs(expected).max()


def test_rows_have_adapters_of_their_own(session, made, x):
    choices = ["b", None, {"a": 0.5, "b": 0.5}, "b"]
    found = session.run({"x": x}, choices, outputs=["y"])["y"]
    for row, choice in enumerate(choices):
        weights = {choice: 1.0} if isinstance(choice, str) else choice or {}
        expected = made.expected(weights, x[row : row + 1])[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_threads_may_run_add_and_remove_at_once(session, made, x):
    expected = {name: made.expected({name: 1.0}, x) for name in SCALES}
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(40):
                found = session.run({"x": x}, name)["y"]
                np.testing.assert_allclose(found, expected[name], atol=1e-5)
        except BaseException as error:
            errors.append(error)

    def change() -> None:
        for _ in range(10):
            session.add("c", made.folder / "a.onnx_adapter")
            session.run({"x": x}, {"a": 1.0, "c": 1.0})
            session.remove("c")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "a")]
    threads.append(threading.Thread(target=change))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert session.adapters == ("a", "b")


def test_it_runs_without_torch(made):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "onnx", "onnxscript", "safetensors"]))
import numpy as np
from gauge_ext.export import AdapterSession
session = AdapterSession({str(made.graph)!r}, {{"a": {str(made.folder / "a.onnx_adapter")!r}}})
x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 5, 6)
print(repr(session.run({{"x": x}}, "a")["y"].tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 5, 6)
    found = np.array(eval(done.stdout))
    np.testing.assert_allclose(found, made.expected({"a": 1.0}, x), atol=1e-5)
