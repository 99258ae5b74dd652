"""The names of the adapters on one model: which there are, and the layers that hold several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn

from gauge_ext.adapters import LoRAConfig, LoRALinear
from gauge_ext.adapters.many import ManyLoRALinear
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models.attach import ROSTER, attachment, lora_layers, unwrap
from gauge_ext.models.row_names import accept_row_names

DEFAULT = "default"


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on ``model``, the oldest first."""
    inner = unwrap(model)
    return tuple(roster(inner)) if lora_layers(inner) else ()


def roster(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configs by name, kept on the model; of one that was only attached, its own."""
    done = attachment(model)
    found: dict[str, LoRAConfig] = vars(model).setdefault(ROSTER, {DEFAULT: done.config})
    return found


def many_layers(model: nn.Module, name: str | None = None) -> dict[str, ManyLoRALinear]:
    """Return the layers, made fit for several adapters if they were not."""
    if name is not None:
        vars(model)[ROSTER] = {name: attachment(model).config}
    first = next(iter(roster(model)))
    layers = lora_layers(model)
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear) or not layer.is_plain:
            raise TargetError(
                f"{path} is a {type(layer).__name__}, and several adapters are "
                "for nn.Linear layers with two factors and nothing else.",
                hint="Attach to linear layers alone, without DoRA, lora_bias or a nonzero start.",
            )
    accept_row_names(model)
    return {
        path: ManyLoRALinear.adopt(cast("LoRALinear", layer), first)
        for path, layer in layers.items()
    }


def active_pairs(model: nn.Module) -> tuple[tuple[str, float], ...]:
    """Return the names and weights of the adapters that work."""
    for layer in lora_layers(model).values():
        if isinstance(layer, ManyLoRALinear):
            return layer.active
    return ((next(iter(roster(model))), 1.0),)


def require_names(model: nn.Module, names: Iterable[str]) -> dict[str, LoRAConfig]:
    """Return the configs of all adapters.

    Raises:
        AdapterStateError: One of ``names`` is not among them.
    """
    configs = roster(model)
    for name in names:
        if name not in configs:
            raise AdapterStateError(
                f"there is no adapter {name!r} on the model.",
                hint=f"There are: {', '.join(map(repr, configs))}.",
            )
    return configs


def require_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name that a further adapter cannot have.

    Raises:
        ConfigError: It is empty, has a dot or a slash, or is one that torch uses.
        AdapterStateError: There is an adapter of that name.
    """
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ConfigError(f"an adapter's name must not be empty or hold '.' or '/', got {name!r}.")
    if hasattr(nn.ModuleDict, name):
        raise ConfigError(f"an adapter cannot be called {name!r}, which torch uses itself.")
    if name in adapter_names(model):
        raise AdapterStateError(
            f"there is an adapter {name!r} already.",
            hint="Give the new one another name, or delete_adapter() the old one.",
        )


def require_unmerged(model: nn.Module) -> None:
    """Refuse a model whose adapters are merged.

    Raises:
        AdapterStateError: They are.
    """
    if any(layer.merged for layer in lora_layers(model).values()):
        raise AdapterStateError(
            "the model's adapters are merged.", hint="Call gauge_ext.unmerge() first."
        )
