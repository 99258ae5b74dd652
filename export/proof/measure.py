"""Latency and memory: ratios that a noisy machine cannot turn around."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from gauge_ext.errors import ExportError

_LEAST_ROUNDS = 5

# Runs alone, so that the peak is that of loading and running and of nothing before. Resident memory
# is read from /proc: ru_maxrss starts with the peak of the process that this one came from.
_MEMORY = """
import sys
import numpy, onnxruntime

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

before = peak()
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded = peak()
if len(sys.argv) > 2:
    with numpy.load(sys.argv[2]) as feeds:
        session.run(None, {name: feeds[name] for name in feeds})
print(before, loaded, peak())
"""


@dataclass(frozen=True)
class Latency:
    """How long one call takes, side by side.

    Attributes:
        what: What was run.
        batch: Rows in a batch.
        seconds: Runtime -> median time of a call.
        rounds: How often each was called.
    """

    what: str
    batch: int
    seconds: dict[str, float]
    rounds: int


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of onnxruntime in a process of its own, above the imports.

    Attributes:
        what: What was run.
        batch: Rows in a batch.
        load: Bytes at most while the file is loaded.
        run: Bytes at most until one call is done.
        weights: Bytes of the file and its external data.
    """

    what: str
    batch: int
    load: int
    run: int
    weights: int


def interleaved(
    calls: Mapping[str, Callable[[], float | None]], *, seconds: float
) -> tuple[dict[str, float], int]:
    """Times several calls in turns, so that what disturbs the machine disturbs them all.

    Args:
        calls: Name -> what to call. It may return the seconds that it took by its own clock, as a
            runtime in another process does; None is timed from here.
        seconds: How long to go on; at least 5 rounds are made.

    Returns:
        Name -> median seconds; the number of rounds. The first call of each is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            own = call()
            times[name].append(time.perf_counter() - begin if own is None else own)
        rounds += 1
    return {name: median(found) for name, found in times.items()}, rounds


def measure_memory(what: str, batch: int, path: Path, feeds: Mapping[str, Any]) -> Memory:
    """Loads a file and runs it once in a process of its own.

    Args:
        what: What is run, for the report.
        batch: Rows in the batch.
        path: The ONNX file.
        feeds: Its inputs, numpy arrays.

    Raises:
        ExportError: the process failed.
    """
    import numpy as np

    with TemporaryDirectory(prefix="gauge-ext-memory-") as folder:
        file = Path(folder) / "feeds.npz"
        np.savez(file, **feeds)
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(path), str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ExportError(f"measuring the memory of {path.name} failed: {done.stderr.strip()}")
    before, loaded, run = map(int, done.stdout.split())
    beside = path.with_name(path.name + ".data")
    weights = sum(file.stat().st_size for file in (path, beside) if file.exists())
    return Memory(what, batch, loaded - before, run - before, weights)
