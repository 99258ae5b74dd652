"""onnxruntime-web in a headless browser: the same file where a user of a page would run it.

A server on the loopback interface hands out one page, the package's scripts and WebAssembly, and
the graph, and nothing else. The page asks it for the next request, runs it, and sends back what it
found. No byte comes from a network.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self

from gauge_ext.errors import ExportError

_PAGE = Path(__file__).with_name("run_onnx.html")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START = 120.0  # seconds for a browser to start and load the graph, on a machine with other work
_RUN = 600.0
_ASK = 5.0  # seconds after which a page that waits for a request asks anew
_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
)


def find_browser() -> str | None:
    """The browser to run: what ``CHROME_BIN`` names, else a Chromium or Chrome on the PATH."""
    named = os.environ.get("CHROME_BIN")
    return next(
        (path for name in (*([named] if named else _BROWSERS),) if (path := shutil.which(name))),
        None,
    )


class Browser:
    """A page in a headless browser that holds a session and answers requests.

    Args:
        package: The folder of onnxruntime-web.
        path: The ONNX file; external data lies beside it.

    Raises:
        ExportError: the browser does not start, or cannot load the file.
    """

    def __init__(self, package: Path, path: Path) -> None:
        self.name = "onnxruntime-web-browser"
        self.seconds: float | None = None
        browser = find_browser()
        assert browser is not None
        self._profile = tempfile.TemporaryDirectory(
            prefix="gauge-ext-browser-", ignore_cleanup_errors=True
        )
        self._server = Server(package / "dist", path)
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        flags = [*_FLAGS, f"--user-data-dir={self._profile.name}"]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
            flags.append("--no-sandbox")
        # A session of its own, so that all of the browser's processes can be ended together.
        self._process = subprocess.Popen(
            [browser, *flags, self._server.url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        try:
            told = self._answer("ready", _START)
        except BaseException:
            self.__exit__()
            raise
        self.name = f"onnxruntime-web-browser {told['version']} (wasm, {told['browser']})"
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._server.closing = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._profile.cleanup()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Runs the graph once; see :class:`gauge_ext.export.validate.Runtime`."""
        import numpy as np

        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        inputs = [
            {"name": name, "type": str(array.dtype), "dims": list(array.shape)}
            for name, array in arrays.items()
        ]
        head = {"inputs": inputs, "outputs": list(outputs)}
        self._server.requests.put(_pack(head, [array.tobytes() for array in arrays.values()]))
        told = self._answer("result", _RUN)
        self.seconds = float(told["seconds"])
        found, body, start = [], told["body"], 0
        for entry in told["outputs"]:
            dtype = np.dtype(entry["type"])
            count = int(np.prod(entry["dims"], dtype=np.int64))
            array = np.frombuffer(body, dtype, count, start).reshape(entry["dims"])
            found.append(array.copy())  # what frombuffer gives is read-only
            start += array.nbytes
        return found

    def _answer(self, kind: str, seconds: float) -> dict[str, Any]:
        """What the page sends next.

        Raises:
            ExportError: it sends an error, or nothing, or the browser has ended.
        """
        left = seconds
        while True:
            try:
                told = self._server.answers.get(timeout=min(1.0, left))
                break
            except queue.Empty:
                left -= 1.0
                status = self._process.poll()
                if status is not None:
                    raise ExportError(f"the browser left with status {status}.") from None
                if left <= 0.0:
                    raise ExportError(
                        f"the browser sent no {kind} in {seconds:.0f} seconds."
                    ) from None
        if "error" in told:
            raise ExportError(f"onnxruntime-web in the browser: {told['error']}")
        found: dict[str, Any] = told
        return found


def _pack(head: Mapping[str, Any], parts: Sequence[bytes]) -> bytes:
    """A request or an answer: 4 bytes of the length of the JSON, the JSON, then the tensors."""
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, *parts))


class Server(ThreadingHTTPServer):
    """Hands out the page and what it needs; takes its answers.

    Attributes:
        url: Of the page. A secret in it keeps other users of the machine from the graph.
        requests: What the page is to run.
        answers: What it sent.
        closing: Set at the end, for threads that wait for a request.
    """

    daemon_threads = True

    def __init__(self, dist: Path, graph: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dist, self.graph = dist.resolve(), graph
        self.secret = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_port}/{self.secret}/page.html"
        self.requests: queue.Queue[bytes] = queue.Queue()
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.closing = False

    def file(self, name: str) -> Path | None:
        """The file that is handed out under a name."""
        data = self.graph.with_name(self.graph.name + ".data")
        fixed = {"page.html": _PAGE, "graph": self.graph, "data": data}
        if name in fixed:
            return fixed[name] if fixed[name].is_file() else None
        folder, _, script = name.partition("/")
        known = folder == "ort" and "/" not in script and (self.dist / script).is_file()
        return self.dist / script if known else None


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a browser asks for icons, too."""

    def do_GET(self) -> None:
        name = self._name()
        if name == "next":
            try:
                self._send(b"" if self.server.closing else self.server.requests.get(timeout=_ASK))
            except queue.Empty:
                self._send(b"")
        elif name == "about":
            data = self.server.graph.with_name(self.server.graph.name + ".data")
            about = {"data": data.name if data.is_file() else None}
            self._send(json.dumps(about).encode())
        elif name is not None and (file := self.server.file(name)) is not None:
            self._send_file(file)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if self._name() != "answer":
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int.from_bytes(body[:4], "little")
        told = json.loads(body[4 : 4 + length])
        self.server.answers.put({**told, "body": body[4 + length :]})
        self._send(b"")

    def _name(self) -> str | None:
        _, secret, name = (*self.path.split("?")[0].split("/", 2), "", "")[:3]
        return name if secrets.compare_digest(secret, self.server.secret) else None

    def _head(self, kind: str, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _send(self, body: bytes) -> None:
        self._head("application/octet-stream", len(body))
        self.wfile.write(body)

    def _send_file(self, file: Path) -> None:
        self._head(_TYPES.get(file.suffix, "application/octet-stream"), file.stat().st_size)
        with file.open("rb") as opened:
            shutil.copyfileobj(opened, self.wfile, 2**20)
