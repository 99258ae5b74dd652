"""A graph with required adapter inputs in onnxruntime-node and -web, here and in a browser.

``make test-js`` installs both with npm and runs this; without node, a browser or the packages it is
skipped, unless GAUGE_EXT_REQUIRE_JS is set.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import gauge_ext
from gauge_ext.export import AdapterSession, export_onnx, write_onnx_adapter
from gauge_ext.export.proof.runtimes import BROWSER, missing, open_runtime

JS = Path(__file__).parents[1] / "js"
RUNTIMES = ("onnxruntime-node", "onnxruntime-web")


def require(*runtimes: str) -> str:
    """The path of node, if it and one of the runtimes are there."""
    node = shutil.which("node")
    present = [name for name in runtimes if (JS / "node_modules" / name / "package.json").is_file()]
    if node is not None and present:
        return node
    reason = f"{'node' if node is None else runtimes[0]} is not installed; type: make test-js"
    if os.environ.get("GAUGE_EXT_REQUIRE_JS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def made(_bert, tmp_path_factory):
    """The graph, the adapter's tensors, inputs, and the outputs with W + s B A by hand."""
    require(*RUNTIMES)  # before the work
    folder = tmp_path_factory.mktemp("js")
    axes = {0: "batch", 1: "sequence"}
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 4:] = 0
    graph = folder / "graph.onnx"
    export_onnx(
        _bert,
        inputs,
        graph,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        mode="adapters",
        adapter_targets=["query", "value", "intermediate.dense"],
        adapter_form="required",
        random_cases=0,
    )
    model = copy.deepcopy(_bert)
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=5, alpha=7, target_modules=["query"]))
    for _, parameter in gauge_ext.named_adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    write_onnx_adapter(model, graph, folder / "adapter.safetensors")
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    safetensors.numpy.save_file(feeds, folder / "inputs.safetensors")
    merged = copy.deepcopy(_bert)
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"):
        layer = model.get_submodule(name)
        update = 7 / 5 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        merged.get_submodule(name).weight.data += update.float()
    with torch.no_grad():
        expected = merged(**inputs).last_hidden_state.numpy()
        plain = _bert(**inputs).last_hidden_state.numpy()
    assert np.abs(expected - plain).max() > 0.1
    return folder, feeds, expected


def agree(runtime: str, found, made, capsys) -> None:
    """What a runtime computed is what Python's does, and what W + s B A gives."""
    folder, feeds, expected = made
    session = AdapterSession(folder / "graph.onnx", {"a": folder / "adapter.safetensors"})
    python = session.run(feeds, "a")["last_hidden_state"]
    difference = float(np.abs(found - python).max())
    with capsys.disabled():
        print(f"\n{runtime} against python: max abs {difference:.2e}")  # noqa: T201
    assert difference <= 1e-5
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_numbers_as_python_and_as_by_hand(runtime, made, capsys):
    node = require(runtime)
    folder, _, _ = made
    files = [folder / "graph.onnx", folder / "inputs.safetensors", folder / "adapter.safetensors"]
    done = subprocess.run(
        [node, str(JS / "run_graph.mjs"), runtime, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    output = said["outputs"]["last_hidden_state"]
    found = np.array(output["data"], np.float32).reshape(output["dims"])
    agree(f"{runtime} {said['version']}", found, made, capsys)


def test_the_same_numbers_in_a_browser(made, capsys, monkeypatch):
    require("onnxruntime-web")
    monkeypatch.setenv("NODE_PATH", str(JS / "node_modules"))
    why = missing(BROWSER)
    if why is not None:
        (pytest.fail if os.environ.get("GAUGE_EXT_REQUIRE_JS") else pytest.skip)(why)
    folder, feeds, _ = made
    factors = safetensors.numpy.load_file(folder / "adapter.safetensors")
    with open_runtime(BROWSER, folder / "graph.onnx") as browser:
        (found,) = browser.run(["last_hidden_state"], feeds | factors)
    agree(browser.name, found, made, capsys)
