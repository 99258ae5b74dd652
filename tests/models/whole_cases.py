"""A model with three adapters, two of which save modules, and what it gives by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.models import (
    adapter_parameters,
    attach,
)

# "c" has no copies; the other two have, of different modules.
SAVED = {"a": ["head"], "b": ["mid", "head"], "c": None}


class Base(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pre, self.up, self.act = nn.Linear(6, 6), nn.Linear(6, 8), nn.Tanh()
        self.mid = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5)
        self.double()


def config(name: str, **fields: object) -> LoRAConfig:
    alpha = {"a": 4.0, "b": 6.0, "c": 1.0}[name]
    named = {"rank": 2, "alpha": alpha, "target_modules": ["up"], "modules_to_save": SAVED[name]}
    return LoRAConfig(**named | fields)


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.5)


def inputs() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def by_hand(model: nn.Module, weights: dict[str, float]) -> Tensor:
    """The bare model with W + sum of w s B A in its layer, and the modules that are saved."""
    plain, tensors = Base(), model.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            within = "" if name == "a" else f"slots.{name}."
            product = tensors[f"up.{within}lora_B"] @ tensors[f"up.{within}lora_A"]
            plain.up.weight += weight * config(name).alpha / 2 * product
            for path in SAVED[name] or ():
                # The first adapter to have copies of a module is the one under its own names.
                within = "slots.b." if (name, path) == ("b", "head") else ""
                for key, own in plain.get_submodule(path).named_parameters():
                    own.copy_(tensors[f"{path}.{within}{key}"])
        return plain(inputs())


def several() -> nn.Module:
    """The model, with drawn numbers in all that is trained."""
    found = Base()
    for name in SAVED:
        attach(found, config(name), name)
    randomize(found)
    return found
