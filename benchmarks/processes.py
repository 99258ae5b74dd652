"""Work in processes of its own: what one took as the system saw it, and files made in one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Cost:
    """What a process took.

    Attributes:
        cpu: User and system seconds.
        wall: Seconds.
        peak: Largest resident memory in MiB.
    """

    cpu: float
    wall: float
    peak: float


def run(task: str, folder: Path, kind: str) -> Cost:
    """Run a task in a fresh process."""
    script = HERE / "export_tasks.py"
    command = [sys.executable, str(script), task, str(folder), kind]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    # An installed package is compiled to bytecode when it is installed, not each time it is used.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{task} failed:\n{(folder / 'log').read_text()[-4000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, int((folder / "peak").read_text()) / 1024)


def run_code(code: str, *arguments: object) -> None:
    """Run Python code that can import the benchmarks, with arguments as text in ``sys.argv``."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)
