"""What the tests of patching share."""

from __future__ import annotations

from pathlib import Path

import pytest

from gauge_ext import _native
from gauge_ext.export.patching import update as update_module


@pytest.fixture(params=["compiled", "numpy"])
def few_rows(request, monkeypatch):
    """Blocks are changed in compiled code or in numpy; returns what sets rows for a chunk."""
    if request.param == "numpy":
        monkeypatch.setattr(_native, "load", lambda: None)
    elif _native.find().module is None:
        pytest.skip("nothing compiled is there")

    def set_rows(rows, *, decoded, stored):
        row = 4 * 4 * decoded if request.param == "numpy" else stored // 4
        monkeypatch.setattr(update_module, "CHUNK", rows * row)

    return set_rows


@pytest.fixture
def base(llama, tmp_path) -> Path:
    """The tiny Llama in three shards, with files that belong to it and files that do not."""
    folder = tmp_path / "base"
    llama.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged")
    (folder / "sub" / "model.gguf").write_bytes(b"unmerged")
    (folder / "adapter_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("")
    return folder


@pytest.fixture
def adapter(llama, make_peft_adapter) -> Path:
    """PEFT's, of rank 3, for two of the tiny Llama's projections."""
    return make_peft_adapter(llama, r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
