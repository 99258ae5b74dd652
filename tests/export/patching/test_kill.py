"""Killed at every call that changes a file: the old result is there, or the new one, and no third.

A child is forked for each call and ends at it, as a SIGKILL would end it: nothing is flushed, no
``finally`` runs. The system keeps what was written, so this is a crash of the program, not of the
machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx_layouts import arrays_of, random_weights, write_adapter, write_model

from gauge_ext.checkpoint import LoRAPair, describe_pairs
from gauge_ext.checkpoint import write_adapter as write_lora
from gauge_ext.export import merge_checkpoint, patch_onnx

_CHILD = """
import hashlib, json, os, pathlib, shutil, sys

module, function, arguments, out, keep = json.loads(sys.argv[1])
work = getattr(__import__(module, fromlist=[function]), function)
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
    def ending(original):
        def call(*a, **k):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
            return original(*a, **k)
        return call
    for name in calls:
        setattr(os, name, ending(getattr(os, name)))
    work(*arguments)

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


def killed(
    function: str, module: str, *arguments: Any, out: Path, keep: bool = True
) -> list[dict[str, str]]:
    """Weights, or visible files, after a kill at the first call, the second, and so on to none."""
    said = json.dumps([module, function, [str(a) for a in arguments], str(out), keep])
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, said], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    assert len(found) > 20
    return found


SHAPES = {"enc.a": (12, 8), "enc.b": (20, 12)}


@pytest.mark.parametrize("external", [False, True], ids=["inside", "outside"])
def test_a_patched_file_is_the_old_one_or_the_new(external, tmp_path):
    base = write_model(
        tmp_path / "base" / "b.onnx", random_weights(SHAPES), ["gemm", "folded"], external=external
    )
    updates = write_adapter(tmp_path / "one", SHAPES)
    write_adapter(tmp_path / "two", SHAPES, seed=1)
    folder = tmp_path / "out"
    out = folder / "m.onnx"
    patch_onnx(base, tmp_path / "two", out)
    old = arrays_of(out)
    states = killed(
        "patch_onnx", "gauge_ext.export.patching.patch", base, tmp_path / "one", out, out=out
    )
    new = arrays_of(out)
    expected = arrays_of(base)["enc.a.weight"] + updates["enc.a"]
    np.testing.assert_allclose(new["enc.a.weight"], expected, rtol=1e-5, atol=1e-5)
    either = [
        {name: sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        for arrays in (old, new)
    ]
    assert either[0] != either[1] == states[-1]
    assert states[0] == either[0]
    assert all(state in either for state in states)
    data = [p.name for p in folder.iterdir() if p != out]  # nothing hidden, and one file of weights
    assert len(data) == int(external)
    assert all(name.endswith(".data") for name in data)


def test_a_merged_folder_is_whole_or_not_there(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    names = [f"layers.{i}.q" for i in range(3)]
    index = {f"{name}.weight": f"model-{i}.safetensors" for i, name in enumerate(names)}
    for name, shard in index.items():
        weights = {name: torch.randn(8, 6)}
        safetensors.torch.save_file(weights, base / shard, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (base / "config.json").write_text("{}")
    pairs = {name: LoRAPair(torch.randn(2, 6), torch.randn(8, 2)) for name in names}
    write_lora(describe_pairs(pairs), pairs, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    out = tmp_path / "place" / "out"
    states = killed(
        "merge_checkpoint",
        "gauge_ext.export.patching.merge",
        base,
        tmp_path / "adapter",
        out,
        out=out,
        keep=False,
    )
    complete = states[-1]
    assert len(complete) == len(whole)
    assert all(state in ({}, complete) for state in states)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    assert [p.name for p in out.parent.iterdir()] == ["out"]
