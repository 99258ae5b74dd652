"""Folders of safetensors, read, rewritten and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gauge_ext.export import merge_checkpoint


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(safetensors.torch.load_file(file))
    return found


def rewrite(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, t) for name, t in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def tensors_of_merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    merge_checkpoint(base, adapter, out)
    return tensors_of(out)
