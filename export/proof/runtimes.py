"""Other runtimes that run the same file: a second opinion on what onnxruntime computes.

A runtime answers ``run(output names, feeds)`` as an onnxruntime session does. OpenVINO runs in this
process; onnxruntime-node and onnxruntime-web (WebAssembly) run in a Node.js process that is given
its inputs and gives back its outputs as files; onnxruntime-web-browser is onnxruntime-web in a page
of a headless Chromium, see :mod:`gauge_ext.export.proof.browser`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.proof.browser import Browser, find_browser
from gauge_ext.export.session import open_session
from gauge_ext.export.validate import Runtime

BROWSER = "onnxruntime-web-browser"
RUNTIMES = ("onnxruntime", "openvino", "onnxruntime-node", "onnxruntime-web", BROWSER)
_SCRIPT = Path(__file__).with_name("run_onnx.cjs")
_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "float64": "float64",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}


def missing(name: str) -> str | None:
    """Why a runtime cannot be used here, or None if it can.

    Raises:
        ConfigError: the name is none of ``RUNTIMES``.
    """
    if name not in RUNTIMES:
        raise ConfigError(
            f"there is no runtime {name!r}.", hint=f"Choose of {', '.join(RUNTIMES)}."
        )
    if not name.startswith("onnxruntime-"):
        found = importlib.util.find_spec(name) is not None
        return None if found else f"it is not installed: pip install {name}"
    if name == BROWSER:
        if find_browser() is None:
            return "no Chromium or Chrome is on the PATH (or set CHROME_BIN)"
    elif shutil.which("node") is None:
        return "node is not on the PATH"
    package = _package(name)
    if node_modules(package) is None:
        return f"npm has not installed it here: npm install {package} (or set NODE_PATH)"
    return None


def _package(name: str) -> str:
    """The npm package of a runtime."""
    return name.removesuffix("-browser")


@contextlib.contextmanager
def open_runtime(name: str, path: Path) -> Iterator[Runtime]:
    """Loads a file in a runtime.

    Args:
        name: One of ``RUNTIMES``.
        path: The ONNX file; external data lies beside it.

    Raises:
        ConfigError: the runtime is unknown or not installed.
        ExportError: it cannot load the file.
    """
    why = missing(name)
    if why is not None:
        raise ConfigError(f"the runtime {name!r} cannot be used: {why}.")
    if name == "onnxruntime":
        yield _Session(*open_session(path))
    elif name == "openvino":
        yield _OpenVino(path)
    elif name == BROWSER:
        modules = node_modules(_package(name))
        assert modules is not None
        with Browser(modules / _package(name), path) as page:
            yield page
    else:
        with _Node(name, path) as runtime:
            yield runtime


class _Session:
    def __init__(self, session: Any, name: str) -> None:
        self.name = name
        self.seconds: float | None = None  # timed from outside
        self.run = session.run


class _OpenVino:
    """OpenVINO on the CPU, told to compute in float32: by default it rounds to bfloat16."""

    def __init__(self, path: Path) -> None:
        import openvino

        self.seconds: float | None = None
        self.name: str = f"openvino {openvino.__version__.split('-')[0]} (CPU, f32)"
        try:
            self._model = openvino.Core().compile_model(
                str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )
        except RuntimeError as error:
            raise ExportError(f"openvino cannot load {path.name}: {error}") from error

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        results = self._model(dict(feeds))
        return [results[name].copy() for name in outputs]


class _Node:
    """A Node.js process that holds a session and answers one line for each line."""

    def __init__(self, package: str, path: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gauge-ext-node-")
        modules = node_modules(package)
        assert modules is not None
        self._package = package
        # Not PIPE for stderr: nobody would read it, and a full pipe blocks.
        self._process = subprocess.Popen(
            ["node", str(_SCRIPT), str(modules / package), str(path.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = package
        self.seconds: float | None = None

    def __enter__(self) -> Self:
        try:
            told = self._read()
        except BaseException:
            self.__exit__()
            raise
        self.name = f"{self._package} {told['version']} ({told['provider']})"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        import numpy as np

        folder = Path(self._folder.name)
        inputs = []
        for index, (name, array) in enumerate(feeds.items()):
            data = np.ascontiguousarray(array)
            (folder / f"in{index}").write_bytes(data.tobytes())
            kind = _DTYPES[str(data.dtype)]
            inputs.append({"name": name, "type": kind, "dims": list(data.shape)})
        assert self._process.stdin is not None
        request = {"folder": str(folder), "inputs": inputs, "outputs": list(outputs)}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ExportError(f"{self._package} left.") from error
        told = self._read()
        self.seconds = float(told["seconds"])
        return [
            # Copied: what frombuffer gives is read-only.
            np.frombuffer((folder / f"out{index}").read_bytes(), dtype=entry["type"])
            .reshape(entry["dims"])
            .copy()
            for index, entry in enumerate(told["outputs"])
        ]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ExportError(f"{self._package} left with status {self._process.wait()}.")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ExportError(f"{self._package}: {told['error']}")
        return told


def node_modules(package: str) -> Path | None:
    """The folder that npm put a package in: of NODE_PATH, here or above, or npm's global one."""
    # Absolute, because node's require() takes a relative path for the name of a package.
    given = os.environ.get("NODE_PATH", "").split(os.pathsep)
    folders = [Path(part).absolute() for part in given if part]
    folders += [folder / "node_modules" for folder in (Path.cwd(), *Path.cwd().parents)]
    folders += [Path("/usr/lib/node_modules"), Path("/usr/local/lib/node_modules")]
    return next((folder for folder in folders if (folder / package).is_dir()), None)
