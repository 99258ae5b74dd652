"""A model of tokens to be stored in fewer bits, inputs for it, and what a file of it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from gauge_ext.export import QuantizationOptions

WIDTH = 64


class Tokens(nn.Module):
    """An embedding, layers on three axes and on two, a norm, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.up = nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pooled = nn.Linear(WIDTH, 40)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return {"logits": self.head(x), "pooled": self.pooled(x.mean(1))}


def feeds(seed: int, rows: int = 4, columns: int = 9) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, 50, (rows, columns))}


CALIBRATION = QuantizationOptions(calibration=[feeds(seed) for seed in range(4)])


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)
