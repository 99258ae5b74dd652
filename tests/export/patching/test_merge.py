"""Folders merged on disk, against sums taken by hand and against merging in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from merged_folders import rewrite, tensors_of, tensors_of_merge

import gauge_ext
from gauge_ext.checkpoint import LoRAPair, describe_pairs, write_adapter
from gauge_ext.export import merge_checkpoint
from gauge_ext.export.patching import update
from gauge_ext.export.patching.merge import PROVENANCE_NAME

transformers = pytest.importorskip("transformers")


def test_every_shard_against_the_sum_by_hand(base, adapter, llama, merge_by_hand, tmp_path):
    out = tmp_path / "out"
    told: list[float] = []
    report = merge_checkpoint(base, adapter, out, progress=lambda what, share: told.append(share))
    before, after = tensors_of(base), tensors_of(out)
    expected = merge_by_hand(llama, adapter, 2.0).state_dict()
    assert list(before) == list(after)
    assert len(report.merged) == 4
    assert report.carried == len(before) - 4
    for name, tensor in after.items():
        if name in report.merged:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    for file in base.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.read_bytes()[:length] == (out / file.name).read_bytes()[:length]
    assert told == sorted(told)
    assert told[-1] == 1.0
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[name], after[name]) for name in report.merged)


def test_what_is_carried_and_what_is_not(base, adapter, tmp_path):
    out = tmp_path / "out"
    report = merge_checkpoint(base, adapter, out)
    for name in ("config.json", "tokenizer.json", "sub/notes.txt", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert sorted(map(str, report.skipped)) == [
        "adapter_config.json",
        "pytorch_model.bin",
        "sub/model.gguf",
    ]
    written = sorted(p for p in out.rglob("*") if p.is_file())
    assert sorted(report.files) == written
    assert report.bytes_written == sum(p.stat().st_size for p in written)
    assert not (out / ".cache").exists()
    said = json.loads((out / PROVENANCE_NAME).read_text())
    assert said["adapter_sha256"] == report.adapter_sha256
    assert said["merged"]["model.layers.1.mlp.down_proj.weight"] == {"rank": 3, "scaling": 2.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_rounded_once(dtype, base, adapter, llama, tmp_path, monkeypatch):
    rewrite(base, lambda name, tensor: tensor.to(dtype))
    monkeypatch.setattr(update, "CHUNK", 5 * 4 * 16)  # blocks of a few rows, the last smaller
    merge_checkpoint(base, adapter, tmp_path / "out")
    model = llama.to(dtype)
    gauge_ext.load_adapter(model, adapter)
    gauge_ext.merge(model)
    after = tensors_of(tmp_path / "out")
    exact = 0
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        expected = model.state_dict()[name]
        # The order of r products may differ between a block and the whole: half a unit at most.
        torch.testing.assert_close(tensor, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        exact += int((tensor == expected).sum())
    assert exact > 0.99 * sum(tensor.numel() for tensor in after.values())


def test_a_prefix_that_the_folder_lacks_or_has(base, adapter, tmp_path):
    expected = tensors_of_merge(base, adapter, tmp_path / "as_it_is")
    for number, rename in enumerate((lambda n: n.removeprefix("model."), lambda n: f"lm.{n}")):
        single = tmp_path / f"single{number}"
        single.mkdir()
        renamed = {rename(name): tensor for name, tensor in tensors_of(base).items()}
        safetensors.torch.save_file(renamed, single / "model.safetensors")
        found = tensors_of_merge(single, adapter, tmp_path / f"out{number}")
        assert {rename(name) for name in expected} == set(found)
        assert all(torch.equal(found[rename(name)], tensor) for name, tensor in expected.items())


def test_sentence_transformers_parts_come_along(base, adapter, tmp_path):
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    for name in ("2_Dense", "3_Other"):
        (base / name).mkdir()
        (base / name / "model.safetensors").write_bytes(b"x")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()
    assert Path("3_Other/model.safetensors") in report.skipped


def test_several_adapters_with_weights(base, adapter, llama, merge_by_hand, tmp_path):
    merge_checkpoint(base, [(adapter, 0.5), (adapter, -1.5)], tmp_path / "out")
    expected = merge_by_hand(llama, adapter, -2.0).state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", None])
def test_weights_that_lie_transposed(family, base, adapter, llama, merge_by_hand, tmp_path):
    """Conv1D's layout: down_proj shows it by its shape, q_proj is square."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": True}))
    rewrite(base, lambda name, t: t.T.contiguous() if "_proj" in name else t)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": family}))
    expected = merge_by_hand(llama, adapter, 2.0).state_dict()
    for name, tensor in tensors_of_merge(base, adapter, tmp_path / "out").items():
        wanted = expected[name].T if "_proj" in name else expected[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


_MEASURED = """
import sys
import numpy
# Not ru_maxrss, which is inherited.
peak = lambda: next(
    int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")
)
before = peak()
from gauge_ext.export.patching.merge import merge_checkpoint
merge_checkpoint(*sys.argv[1:4])
assert not {"torch", "onnx", "safetensors"} & set(sys.modules)
print(peak() - before)
"""


def test_memory_stays_small(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {f"layers.{i}.q.weight": torch.zeros(4096, 3072).bfloat16() for i in range(6)}
    tensors["embed.weight"] = torch.zeros(20_000, 3072)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = {f"layers.{i}.q": LoRAPair(torch.ones(8, 3072), torch.ones(4096, 8)) for i in range(6)}
    write_adapter(describe_pairs(pairs), pairs, tmp_path / "adapter")
    del tensors
    command = [sys.executable, "-c", _MEASURED, folder, tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").stat().st_size > 300 * 2**20
    assert 0 < float(done.stdout) < 64
    assert tensors_of(tmp_path / "out")["layers.5.q.weight"].eq(8.0).all()
