"""Models after a full fine-tune, and their folders written by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

Folders = tuple[Path, Path]


def perturbed(model: nn.Module, rank: int | None = None, seed: int = 1) -> nn.Module:
    """A copy whose matrices changed, by a matrix of the given rank or by a full one."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for part in twin.modules():
            if isinstance(part, nn.Linear):
                m, n = part.weight.shape
                change = torch.randn(m, n, generator=generator)
                if rank is not None:
                    left = torch.randn(m, rank, generator=generator)
                    change = left @ torch.randn(rank, n, generator=generator)
                part.weight += 0.05 * change.to(part.weight.dtype)
    return twin


def put(model: nn.Module, folder: Path, *, shards: int = 1, prefix: str = "") -> Path:
    """Write a model's folder by hand."""
    folder.mkdir()
    state = {prefix + name: t.contiguous().clone() for name, t in model.state_dict().items()}
    names = list(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    table = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[index::shards]}
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder
