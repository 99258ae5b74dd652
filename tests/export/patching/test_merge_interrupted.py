"""Merges on disk that are interrupted, that run twice at once, or whose disk fills up."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_folders import tensors_of, tensors_of_merge

from gauge_ext.errors import WriteError
from gauge_ext.export import merge_checkpoint
from gauge_ext.export.patching import merge as merge_module


def test_a_disk_that_fills_up(base, adapter, tmp_path, listing, monkeypatch):
    before = listing()
    copy = shutil.copyfile
    left = [3]

    def copyfile(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(WriteError, match="No space left on device"):
        merge_checkpoint(base, adapter, tmp_path / "deep" / "out")
    assert listing() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_merge_goes_on_where_it_was(
    error, base, adapter, tmp_path, listing, monkeypatch
):
    whole = tensors_of_merge(base, adapter, tmp_path / "whole")
    before = listing()
    shards = sorted(base.glob("*.safetensors"))
    original = merge_module._merge_shard
    done: list[str] = []

    def stop_at_the_third(source: Path, *rest: Any) -> None:
        if len(done) == 2:
            raise error
        original(source, *rest)
        done.append(source.name)

    monkeypatch.setattr(merge_module, "_merge_shard", stop_at_the_third)
    with pytest.raises(error):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merge_module, "_merge_shard", original)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(map(str, report.resumed)) == sorted(done)
    assert len(done) == 2 < len(shards)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())
    assert [name for name in listing() if not name.startswith("out")] == before


def test_what_another_merge_left_is_not_used(base, adapter, tmp_path, monkeypatch):
    original = merge_module._merge_shard

    def stop(source: Path, *rest: Any) -> None:
        original(source, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "_merge_shard", stop)
    for _ in range(2):  # the second goes on after the first, whose shard was not finished
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(base, adapter, tmp_path / "out")
    monkeypatch.setattr(merge_module, "_merge_shard", original)
    report = merge_checkpoint(base, {adapter: 0.25}, tmp_path / "out")
    assert report.resumed == ()
    single = tensors_of_merge_weighted(base, adapter, 0.25, tmp_path / "fresh")
    assert all(torch.equal(t, single[n]) for n, t in tensors_of(tmp_path / "out").items())


def tensors_of_merge_weighted(
    base: Path, adapter: Path, weight: float, out: Path
) -> dict[str, torch.Tensor]:
    merge_checkpoint(base, {adapter: weight}, out)
    return tensors_of(out)


def test_two_at_once(base, adapter, tmp_path, monkeypatch):
    original = merge_module._merge_shard

    def again(*arguments: Any) -> None:
        monkeypatch.setattr(merge_module, "_merge_shard", original)
        with pytest.raises(WriteError, match="another process is writing it"):
            merge_checkpoint(base, adapter, tmp_path / "out")
        original(*arguments)

    monkeypatch.setattr(merge_module, "_merge_shard", again)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
