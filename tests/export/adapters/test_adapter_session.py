"""One base, many adapters: switching, mixing, rows, and each of onnxruntime's silent traps."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import gauge_ext
from gauge_ext.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    ExportError,
    NonFiniteError,
)
from gauge_ext.export import AdapterSession, export_onnx, write_onnx_adapter

ROOT = Path(__file__).parents[3]
SCALES = {"a": 2.0, "b": 1.5}


class Sequences(nn.Module):
    """Two outputs, one of which has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"y": y, "mean": y.mean((0, 1))}


class Made:
    """A graph in both forms, two adapters on it, and the models merged by hand."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        self.base = Sequences().eval()
        self.folder = folder
        self.factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, rank in (("a", 3), ("b", 2)):
            model = copy.deepcopy(self.base)
            config = gauge_ext.LoRAConfig(rank=rank, alpha=SCALES[name] * rank)
            gauge_ext.attach(model, config)
            for _, parameter in gauge_ext.named_adapter_parameters(model):
                nn.init.normal_(parameter, std=0.5)
            gauge_ext.save_adapter(model, folder / name)
            self.factors[name] = {
                layer: (
                    getattr(model, layer).lora_A.detach(),
                    getattr(model, layer).lora_B.detach(),
                )
                for layer in ("up", "down")
            }
        for form in ("optional", "required"):
            export_onnx(
                self.base,
                (torch.randn(2, 5, 6),),
                folder / f"{form}.onnx",
                dynamic_shapes=({0: "batch", 1: "steps"},),
                mode="adapters",
                adapter_targets="all-linear",
                adapter_form=form,
                validate=False,
            )
        self.graph = folder / "optional.onnx"
        for name in SCALES:
            write_onnx_adapter(folder / name, self.graph, folder / f"{name}.onnx_adapter")

    def expected(self, weights: dict[str, float], x: np.ndarray) -> np.ndarray:
        """The output with W + sum_i w_i s_i B_i A_i, in float64."""
        twin = copy.deepcopy(self.base).double()
        for name, weight in weights.items():
            for layer, (a, b) in self.factors[name].items():
                update = weight * SCALES[name] * (b.double() @ a.double())
                getattr(twin, layer).weight.data += update
        return twin(torch.from_numpy(x).double())["y"].detach().numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("session"))


@pytest.fixture
def session(made) -> AdapterSession:
    return AdapterSession(
        made.graph, {name: made.folder / f"{name}.onnx_adapter" for name in SCALES}
    )


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)


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


class TestRefusals:
    def test_names_of_inputs_and_outputs(self, session, x):
        with pytest.raises(ConfigError, match="no input 'z'; it has x"):
            session.run({"x": x, "z": x})
        with pytest.raises(ConfigError, match="'x' is not fed"):
            session.run({})
        with pytest.raises(ConfigError, match="no output 'z'; it has y, mean"):
            session.run({"x": x}, outputs=["z"])

    def test_an_output_without_rows(self, session, x):
        with pytest.raises(ConfigError, match="'mean'.*no axis 'batch'"):
            session.run({"x": x}, ["a", "b", "a", "b"])

    @pytest.mark.parametrize("choice", [{}, {"a": float("nan")}, {"a": True}, 3])
    def test_choices(self, choice, session, x):
        with pytest.raises((ConfigError, TypeError)):
            session.run({"x": x}, choice)

    def test_what_onnxruntime_refuses(self, session, x):
        with pytest.raises(ExportError, match="onnxruntime refuses to run"):
            session.run({"x": x.astype(np.float64)}, "a")

    @pytest.mark.parametrize(
        ("arrays", "error", "match"),
        [
            ({"up.lora_A": np.zeros((6, 2))}, AdapterMismatchError, "float32.*got float64"),
            ({"up.lora_A": np.zeros((7, 2), "f")}, AdapterMismatchError, r"\[6, 'r0'\]"),
            ({"no.lora_A": np.zeros((6, 2), "f")}, AdapterMismatchError, "no adapter inputs"),
            ({"up.lora_A": np.zeros((6, 2), "f")}, AdapterMismatchError, "lacks 'up.lora_B'"),
            (
                {"up.lora_A": np.zeros((6, 2), "f"), "up.lora_B": np.zeros((3, 10), "f")},
                AdapterMismatchError,
                "rank 3.*rank 2",
            ),
            (
                {"up.lora_A": np.full((6, 1), np.nan, "f"), "up.lora_B": np.zeros((1, 10), "f")},
                NonFiniteError,
                "up.lora_A",
            ),
        ],
    )
    def test_arrays(self, arrays, error, match, session):
        with pytest.raises(error, match=match):
            session.add("c", arrays)
        assert session.adapters == ("a", "b")

    def test_a_name_that_is_taken(self, session, made):
        with pytest.raises(ConfigError, match="already"):
            session.add("a", made.folder / "a.onnx_adapter")

    def test_files(self, session, made, tmp_path):
        cut = tmp_path / "cut.onnx_adapter"
        cut.write_bytes((made.folder / "a.onnx_adapter").read_bytes()[:200])
        foreign = made.folder / "a" / "adapter_model.safetensors"
        for path, match in (
            (cut, "cut.onnx_adapter"),
            (foreign, "not written for a graph"),
            (tmp_path / "none", "there is no"),
            (made.graph, "must be a folder"),
        ):
            with pytest.raises(AdapterFormatError, match=match):
                session.add("c", path)

    def test_an_adapter_for_another_base_of_the_same_shape(self, made, tmp_path):
        other = copy.deepcopy(made.base)
        other.up.weight.data += 1
        graph = tmp_path / "other.onnx"
        options = {"mode": "adapters", "adapter_targets": "all-linear", "validate": False}
        export_onnx(other, (torch.randn(2, 5, 6),), graph, **options)
        with pytest.raises(AdapterMismatchError, match="another graph"):
            AdapterSession(graph, {"a": made.folder / "a.onnx_adapter"})
        fixed = AdapterSession(graph, {"a": made.folder / "a"})
        with pytest.raises(ConfigError, match="batch size of the graph is fixed"):
            fixed.run({"x": np.zeros((2, 5, 6), np.float32)}, ["a", "a"], outputs=["y"])

    def test_graphs(self, made, tmp_path):
        with pytest.raises(ConfigError, match="no file"):
            AdapterSession(tmp_path / "none.onnx")
        (tmp_path / "bad.onnx").write_bytes(b"no")
        with pytest.raises(ExportError, match=r"bad\.onnx"):
            AdapterSession(tmp_path / "bad.onnx")
        export_onnx(made.base, (torch.randn(2, 5, 6),), tmp_path / "m.onnx", validate=False)
        with pytest.raises(ConfigError, match="--mode adapters"):
            AdapterSession(tmp_path / "m.onnx")


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
