"""The same file in other runtimes; what is not installed is skipped and says what is missing.

``make test-js`` installs those of npm; with GAUGE_EXT_REQUIRE_JS set, one that is missing fails.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export import export_onnx
from gauge_ext.export.proof.browser import Browser, Server
from gauge_ext.export.proof.prove import prove
from gauge_ext.export.proof.runtimes import RUNTIMES, missing, node_modules, open_runtime
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.validate import validate_onnx


class Mixed(nn.Module):
    """Inputs and outputs of several dtypes and ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, ids: Tensor, keep: Tensor, x: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(self.embed(ids) + x)
        hidden = torch.where(keep[:, :, None], hidden, torch.zeros(()))
        return {"hidden": hidden, "best": hidden.argmax(-1), "positive": hidden.sum(-1) > 0}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    model = Mixed()
    inputs = (torch.randint(9, (2, 3)), torch.rand(2, 3) < 0.7, torch.randn(2, 3, 4))
    path = tmp_path_factory.mktemp("mixed") / "m.onnx"
    axes = {0: "batch", 1: "length"}
    export_onnx(
        model, inputs, path, dynamic_shapes=(axes, axes, axes), external_data=True, validate=False
    )
    return model, inputs, path


@pytest.fixture(params=RUNTIMES)
def name(request) -> str:
    why = missing(request.param)
    if why is not None:
        if request.param.startswith("onnxruntime-") and os.environ.get("GAUGE_EXT_REQUIRE_JS"):
            pytest.fail(f"{request.param}: {why}")
        pytest.skip(f"{request.param}: {why}")
    return request.param


def test_a_runtime_computes_what_torch_does(name, mixed):
    model, inputs, path = mixed
    with open_runtime(name, path) as runtime:
        assert runtime.name.startswith(name)
        report = validate_onnx(path, model, inputs, runtime=runtime)
        assert report.passed, report.failures
        assert report.runtime == runtime.name
        assert len(report.cases) == 5
        # Outputs in the order in which they are asked for.
        feeds = dict(zip(("ids", "keep", "x"), (t.numpy() for t in inputs), strict=True))
        best, hidden = runtime.run(["best", "hidden"], feeds)
    expected = model(*inputs)
    np.testing.assert_allclose(hidden, expected["hidden"].detach().numpy(), atol=1e-5)
    assert np.array_equal(best, expected["best"].numpy())


def test_a_wrong_model_is_found(name, mixed):
    model, inputs, path = mixed
    other = Mixed()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.linear.bias += 0.01
    with open_runtime(name, path) as runtime:
        assert not validate_onnx(path, other, inputs, runtime=runtime).passed


def test_every_runtime_is_timed_in_turns(name, mixed):
    model, inputs, path = mixed
    runtimes = dict.fromkeys(("onnxruntime", name))
    proof = prove(path, [Subject(path, model, inputs)], runtimes=list(runtimes), latency=0.01)
    assert proof.passed, proof.failures
    assert [row.batch for row in proof.latencies] == [1, 8]
    for row in proof.latencies:
        assert list(row.seconds) == ["torch", *runtimes]
        assert all(0 < seconds < 60 for seconds in row.seconds.values())
    # In another process it is the runtime's own clock, without the way there and back.
    feeds = dict(zip(("ids", "keep", "x"), (t.numpy() for t in inputs), strict=True))
    with open_runtime(name, path) as runtime:
        runtime.run(["hidden"], feeds)
        assert (runtime.seconds is not None) == name.startswith("onnxruntime-")


def test_a_file_that_is_no_graph(name, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ExportError), open_runtime(name, path):
        pass


def test_inputs_that_it_refuses(name, mixed):
    _, inputs, path = mixed
    feeds = dict(zip(("ids", "keep", "x"), (t.numpy() for t in inputs), strict=True))
    with open_runtime(name, path) as runtime:
        with pytest.raises(Exception, match=r"\S"):  # each has its own kind
            runtime.run(["hidden"], feeds | {"x": feeds["x"][:, :, :3].copy()})
        assert runtime.run(["hidden"], feeds)[0].shape == (2, 3, 3)  # and goes on


def test_a_runtime_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"no runtime 'tensorrt'.*onnxruntime-web"):
        missing("tensorrt")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing("onnxruntime-node") == "node is not on the PATH"
    with (
        pytest.raises(ConfigError, match="cannot be used: node is not on the PATH"),
        open_runtime("onnxruntime-node", tmp_path / "m.onnx"),
    ):
        pass


def test_the_browsers_server_hands_out_nothing_else(mixed, tmp_path):
    _, _, path = mixed
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "ort.js").write_text("script")
    (tmp_path / "secret.txt").write_text("private")
    server = Server(tmp_path / "dist", path)
    Thread(target=server.serve_forever, daemon=True).start()

    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read()

    try:
        base = server.url.removesuffix("page.html")
        assert get(base + "ort/ort.js") == b"script"
        assert get(base + "graph") == path.read_bytes()
        root = f"http://127.0.0.1:{server.server_port}/"
        for url in (
            *(root, root + "page.html", root + "wrong/graph"),
            *(base, base + "ort/", base + "ort/../secret.txt", base + "ort/..%2Fsecret.txt"),
            base + f"ort/{tmp_path}/secret.txt",
        ):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(url)
    finally:
        server.shutdown()
        server.server_close()


def test_a_browser_that_ends(monkeypatch, mixed, tmp_path):
    _, _, path = mixed
    browser = tmp_path / "chrome"
    browser.write_text("#!/bin/sh\nexit 3\n")
    browser.chmod(0o755)
    monkeypatch.setenv("CHROME_BIN", str(browser))
    with pytest.raises(ExportError, match="browser left with status 3"), Browser(tmp_path, path):
        pass
    monkeypatch.setenv("CHROME_BIN", str(tmp_path / "none"))
    assert "CHROME_BIN" in str(missing("onnxruntime-web-browser"))


def test_where_npm_packages_are_looked_for(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    node = tmp_path / "bin" / "node"
    node.write_text("#!/bin/sh\n")
    node.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "modules"))
    folder = tmp_path / "work" / "deep"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    package = "onnxruntime-web"
    (tmp_path / "work" / "node_modules" / package).mkdir(parents=True)
    assert missing(package) is None
    (tmp_path / "work" / "node_modules" / package).rmdir()
    assert "npm install onnxruntime-web" in str(missing(package))
    (tmp_path / "modules" / package).mkdir(parents=True)
    assert missing(package) is None
    monkeypatch.setenv("NODE_PATH", "../../modules")
    found = node_modules(package)
    assert found is not None
    assert found.is_absolute()
    assert found.samefile(tmp_path / "modules")
