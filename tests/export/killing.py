"""Killed at every call that changes a file: what is there afterwards, kill by kill.

A child is forked for each call and ends at it, as a SIGKILL would end it: nothing is flushed, no
``finally`` runs. The system keeps what was written, so this is a crash of the program, not of the
machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent
_CHILD = """
import builtins, hashlib, io, json, os, pathlib, shutil, sys

source, out, keep = json.loads(sys.argv[1])
space = {"OUT": out}
exec(source, space)
work = space["work"]
calls = ["open", "pwrite", "write", "copy_file_range", "truncate", "fsync", "rename", "replace",
         "unlink", "rmdir", "mkdir", "chmod", "link"]

def sha(content):
    return hashlib.sha256(content).hexdigest()

def state():
    if out.endswith(".onnx"):
        from gauge_ext.export.disk.onnx_file import open_onnx
        from gauge_ext.export.disk.spans import read
        return {name: sha(read(t.span)) for name, t in open_onnx(out).initializers.items()}
    files = sorted(p for p in pathlib.Path(out).parent.rglob("*")
                   if p.is_file() and not any(part.startswith(".") for part in p.parts))
    return {str(p): sha(p.read_bytes()) for p in files}

def run(limit):
    left = [limit]
    def ending(original, counts=lambda *a, **k: True):
        def call(*a, **k):
            left[0] -= counts(*a, **k)
            if left[0] < 0:
                os.kill(os.getpid(), 9)
            return original(*a, **k)
        return call
    for name in calls:
        setattr(os, name, ending(getattr(os, name)))
    def writes(file, mode="r", *a, **k):
        return not set("wax+").isdisjoint(mode)
    builtins.open = io.open = ending(io.open, writes)
    work()

states, limit = [], 0
while True:
    child = os.fork()
    if child == 0:
        try:
            run(limit)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    states.append(state())
    if status == 0:
        break
    if not keep:
        shutil.rmtree(out, ignore_errors=True)
    assert status == 9, status
    limit += 1
print(json.dumps(states))
"""


def killed(source: str, out: Path, *, keep: bool = True) -> list[dict[str, str]]:
    """Weights of an ``.onnx`` file, or visible files, after a kill at each call, and after none.

    Args:
        source: Python that defines ``work()``, which writes ``OUT``; run once before all forks.
        out: What it writes.
        keep: Whether what one kill left is there for the next.
    """
    said = json.dumps([source, str(out), keep])
    # A pool of threads does not survive a fork, and whoever waits for it waits for ever.
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_FOLDER)}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, said],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found
