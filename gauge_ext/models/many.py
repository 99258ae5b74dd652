"""Several adapters on one model, under names: put on, taken off, called otherwise."""

from __future__ import annotations

import warnings
from typing import TypeVar, cast

from torch import nn

from gauge_ext.adapters import LoRAConfig, LoRALinear, adapt, variant_for
from gauge_ext.adapters.many import ManyLoRALinear
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models.attach import attach, lora_layers, unwrap
from gauge_ext.models.roster import (
    active_pairs,
    many_layers,
    require_names,
    require_new_name,
    require_unmerged,
    roster,
)
from gauge_ext.models.targets import find_targets, nearest_hint

ModelT = TypeVar("ModelT", bound=nn.Module)


def add_adapter(model: ModelT, config: LoRAConfig, name: str) -> ModelT:
    """Put a further adapter on a model, or the first one under a name of its own.

    It may have other layers, ranks and scales than those that are there. It is trainable and, if
    there are others, not active: see :func:`set_adapters`.

    Args:
        model: A bare model, or one with adapters on ``nn.Linear`` layers.
        config: Which layers, which rank, which scale.
        name: Not empty, without a dot or a slash; :func:`~gauge_ext.attach` calls its own
            ``default``.

    Returns:
        ``model``.

    Raises:
        ConfigError: The name cannot be used, or ``config`` asks for what only a single adapter can.
        TargetError: No layer is meant, or one that cannot carry several adapters.
        AdapterStateError: There is an adapter of that name, or the adapters are merged.
    """
    inner = unwrap(model)
    require_new_name(inner, name)
    if not lora_layers(inner):
        attach(inner, config)
        many_layers(inner, name)
        return model
    configs = roster(inner)
    require_unmerged(inner)
    _require_plain(config)
    layers = _find(inner, config)
    fresh = [layer for layer in layers.values() if not isinstance(layer, ManyLoRALinear)]
    done: list[nn.Module] = []
    try:
        for path, layer in layers.items():
            spec = config.spec_for(path)
            if isinstance(layer, ManyLoRALinear):
                layer.add(name, spec)
            else:
                added = ManyLoRALinear.adopt(cast("LoRALinear", adapt(layer, spec)), name)
                added.active = active_pairs(inner)
            done.append(layer)
    except BaseException:
        for layer in done:
            many = cast("ManyLoRALinear", layer)
            if layer in fresh:
                many.to_base()
            else:
                many.remove(name)
        raise
    configs[name] = config
    return model


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Take one of several adapters off; of the last one :func:`~gauge_ext.detach` does.

    Raises:
        AdapterStateError: There is no such adapter, it is the only one, or the adapters are merged.
    """
    inner = unwrap(model)
    configs = require_names(inner, [name])
    require_unmerged(inner)
    if len(configs) == 1:
        raise AdapterStateError(
            f"{name!r} is the only adapter.", hint="Call gauge_ext.detach() to take it off."
        )
    remaining = tuple(pair for pair in active_pairs(inner) if pair[0] != name)
    for layer in many_layers(inner).values():
        layer.active = remaining
        if layer.names == (name,):
            layer.to_base()
        elif name in layer.names:
            layer.remove(name)
    del configs[name]
    return model


def rename_adapter(model: ModelT, old: str, new: str) -> ModelT:
    """Call an adapter otherwise; its parameters stay the same objects.

    Raises:
        AdapterStateError: There is no adapter ``old``, or there is one called ``new``.
        ConfigError: The new name cannot be used.
    """
    inner = unwrap(model)
    configs = require_names(inner, [old])
    require_new_name(inner, new)
    for layer in many_layers(inner).values():
        layer.rename(old, new)
    renamed = {new if name == old else name: config for name, config in configs.items()}
    configs.clear()
    configs.update(renamed)
    return model


def named_config(model: nn.Module, name: str) -> LoRAConfig:
    """Return the config of one adapter.

    Raises:
        AdapterStateError: There is no such adapter.
    """
    return require_names(unwrap(model), [name])[name]


def adapter_factors(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return what holds ``lora_A`` and ``lora_B`` of one adapter, by the path of the layer.

    Raises:
        AdapterStateError: There is no such adapter.
    """
    inner = unwrap(model)
    require_names(inner, [name])
    found = {path: layer for path, layer in many_layers(inner).items() if name in layer.names}
    return {path: layer.adapter(name) for path, layer in found.items()}


def _find(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the layers that ``config`` means, whether they carry adapters or not."""
    present = many_layers(model)
    for layer in present.values():
        layer.__class__ = cast("type[ManyLoRALinear]", nn.Linear)
    try:
        match = find_targets(model, config)
    finally:
        for layer in present.values():
            layer.__class__ = ManyLoRALinear
    if match.unmatched:
        warnings.warn(
            f"target_modules {list(match.unmatched)} match no module and were passed over. "
            + nearest_hint(model, match.unmatched),
            stacklevel=3,
        )
    for path, found in match.layers.items():
        if not isinstance(found, LoRALinear) and variant_for(found) is not LoRALinear:
            raise TargetError(
                f"{path} is a {type(found).__name__} or its weight is quantized, and several "
                "adapters are for nn.Linear.",
                hint="Name linear layers alone in target_modules.",
            )
    return dict(match.layers)


def _require_plain(config: LoRAConfig) -> None:
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config must be a LoRAConfig, got a {type(config).__name__}.")
    if config.init not in ("kaiming", "gaussian"):
        raise ConfigError(f"init={config.init!r} is for a model with a single adapter.")
    for field, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
        if getattr(config, field, plain) != plain:
            raise ConfigError(
                f"{field}={getattr(config, field)!r} is for a model with a single adapter."
            )
