"""The names of the adapters on one model: which there are, which may come, which work."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models.adapted import adapter_config, attachment, lora_layers, unwrap


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on ``model``, the oldest first."""
    inner = unwrap(model)
    return tuple(attachment(inner).configs) if lora_layers(inner) else ()


def adapter_slots(model: nn.Module, name: str) -> dict[str, AdapterSlot]:
    """Return what holds the parameters of one adapter, by the path of the layer.

    Raises:
        AdapterStateError: There is no such adapter.
    """
    adapter_config(model, name)
    layers = lora_layers(model)
    return {path: layer.adapter(name) for path, layer in layers.items() if name in layer.names}


def active_pairs(model: nn.Module) -> tuple[tuple[str, float], ...]:
    """Return the names and weights of the adapters that work."""
    return next((layer.active for layer in lora_layers(model).values()), ())


def require_names(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names that no adapter has.

    Raises:
        AdapterStateError: One of ``names`` is none, or the model has no adapters.
    """
    attachment(model)
    for name in names:
        adapter_config(model, name)


def sole_name(model: nn.Module, purpose: str) -> str:
    """Return the name of the only adapter, or of the only active one.

    Args:
        model: A model with adapters.
        purpose: What it is wanted for, such as "saved".

    Raises:
        AdapterStateError: There are none, or several of which not one is active.
    """
    names = tuple(attachment(model).configs)
    active = [name for name, _ in active_pairs(model)]
    if len(names) == 1:
        return names[0]
    if len(active) == 1:
        return active[0]
    raise AdapterStateError(
        f"the model has the adapters {', '.join(map(repr, names))}, and it is not said which is to "
        f"be {purpose}.",
        hint="Give name=, or make one of them active with set_adapters().",
    )


def require_one(model: nn.Module, purpose: str) -> None:
    """Refuse a model with several adapters.

    Args:
        model: A model with adapters.
        purpose: What takes one alone, such as "start_from_inputs()".

    Raises:
        AdapterStateError: There are several, or none.
    """
    names = tuple(attachment(model).configs)
    if len(names) > 1:
        raise AdapterStateError(
            f"{purpose} takes a model with one adapter, and this one has "
            f"{', '.join(map(repr, names))}.",
            hint="Call delete_adapter() for the others; save_adapter() keeps them.",
        )


def require_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name that a further adapter cannot have.

    Raises:
        ConfigError: It is empty, has a dot or a slash, or is one that torch uses.
        AdapterStateError: There is an adapter of that name, or only a part of the model has
            adapters.
    """
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ConfigError(f"an adapter's name must not be empty or hold '.' or '/', got {name!r}.")
    if hasattr(nn.ModuleDict, name):
        raise ConfigError(f"an adapter cannot be called {name!r}, which torch uses itself.")
    layers = lora_layers(model)
    if layers and name in attachment(model).configs:
        raise AdapterStateError(
            f"the model has an adapter {name!r} already; its adapters are on {len(layers)} layers, "
            f"the first of them {next(iter(layers))!r}.",
            hint="Give the new one a name of its own (name=), or call gauge_ext.detach() first.",
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
