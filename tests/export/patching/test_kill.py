"""Killed at every call that changes a file: the old result is there, or the new one, no third."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
import pytest
import safetensors.torch
import torch
from killing import killed
from onnx_layouts import arrays_of, random_weights, write_adapter, write_model

from gauge_ext.checkpoint import LoRAPair, describe_pairs
from gauge_ext.checkpoint import write_adapter as write_lora
from gauge_ext.export import merge_checkpoint, patch_onnx

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
    source = f"""
from gauge_ext.export.patching.patch import patch_onnx
work = lambda: patch_onnx({str(base)!r}, {str(tmp_path / "one")!r}, OUT)
"""
    states = killed(source, out)
    assert len(states) > 20
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
    source = f"""
from gauge_ext.export.patching.merge import merge_checkpoint
work = lambda: merge_checkpoint({str(base)!r}, {str(tmp_path / "adapter")!r}, OUT)
"""
    states = killed(source, out, keep=False)
    assert len(states) > 20
    complete = states[-1]
    assert len(complete) == len(whole)
    assert all(state in ({}, complete) for state in states)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    assert [p.name for p in out.parent.iterdir()] == ["out"]
