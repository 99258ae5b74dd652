"""A model with three adapters of other ranks and layers, and what it gives by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.models import adapter_parameters, attach
from gauge_ext.models.many import add_adapter
from gauge_ext.models.roster import adapter_slots

CONFIGS = {
    "default": LoRAConfig(rank=4, alpha=8, target_modules=["0", "2"]),
    "b": LoRAConfig(rank=2, alpha=1, target_modules=["2"]),
    "c": LoRAConfig(rank=3, alpha=9, target_modules=["0", "4"]),
}


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)
    return nn.Sequential(*layers).double()


def randomize(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def by_hand(model: nn.Module, x: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Run the bare model with W + sum of w s B A put into its weights."""
    plain = bare()
    for name, weight in weights.items():
        for path, holder in adapter_slots(model, name).items():
            config = CONFIGS[name]
            scale = weight * config.alpha / config.rank
            update = scale * holder.get_parameter("lora_B") @ holder.get_parameter("lora_A")
            layer = plain.get_submodule(path)
            layer.weight = nn.Parameter(layer.weight + update.detach())  # type: ignore[operator]
    return plain(x).detach()


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def several() -> nn.Sequential:
    """The model, with drawn numbers in all that is trained."""
    found = bare()
    attach(found, CONFIGS["default"])
    add_adapter(found, CONFIGS["b"], "b")
    add_adapter(found, CONFIGS["c"], "c")
    randomize(found)
    return found
