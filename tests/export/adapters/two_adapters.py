"""A graph that takes adapters, two of them, and what it must give with each by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gauge_ext
from gauge_ext.export import export_onnx, write_onnx_adapter

SCALES = {"a": 2.0, "b": 1.5}


class Sequences(nn.Module):
    """Two outputs, one of which has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"y": y, "mean": y.mean((0, 1))}


class Made:
    """A graph in both forms, two adapters on it, and the models merged by hand."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        self.base = Sequences().eval()
        self.folder = folder
        self.factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, rank in (("a", 3), ("b", 2)):
            model = copy.deepcopy(self.base)
            config = gauge_ext.LoRAConfig(rank=rank, alpha=SCALES[name] * rank)
            gauge_ext.attach(model, config)
            for _, parameter in gauge_ext.named_adapter_parameters(model):
                nn.init.normal_(parameter, std=0.5)
            gauge_ext.save_adapter(model, folder / name)
            self.factors[name] = {
                layer: (
                    getattr(model, layer).lora_A.detach(),
                    getattr(model, layer).lora_B.detach(),
                )
                for layer in ("up", "down")
            }
        for form in ("optional", "required"):
            export_onnx(
                self.base,
                (torch.randn(2, 5, 6),),
                folder / f"{form}.onnx",
                dynamic_shapes=({0: "batch", 1: "steps"},),
                mode="adapters",
                adapter_targets="all-linear",
                adapter_form=form,
                validate=False,
            )
        self.graph = folder / "optional.onnx"
        for name in SCALES:
            write_onnx_adapter(folder / name, self.graph, folder / f"{name}.onnx_adapter")

    def expected(self, weights: dict[str, float], x: np.ndarray) -> np.ndarray:
        """The output with W + sum_i w_i s_i B_i A_i, in float64."""
        twin = copy.deepcopy(self.base).double()
        for name, weight in weights.items():
            for layer, (a, b) in self.factors[name].items():
                update = weight * SCALES[name] * (b.double() @ a.double())
                getattr(twin, layer).weight.data += update
        return twin(torch.from_numpy(x).double())["y"].detach().numpy()
