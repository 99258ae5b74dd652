"""Several adapters on one model, under names: which are there, and which of them work."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn

from gauge_ext.adapters import LoRAConfig, LoRALinear, adapt, variant_for
from gauge_ext.adapters.inits import starts_nonzero
from gauge_ext.adapters.many import ManyLoRALinear
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError
from gauge_ext.models.attach import ROSTER, attach, attachment, lora_layers, unwrap
from gauge_ext.models.row_names import accept_row_names
from gauge_ext.models.targets import find_targets, nearest_hint

ModelT = TypeVar("ModelT", bound=nn.Module)

DEFAULT = "default"


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
    _require_name(inner, name)
    if not lora_layers(inner):
        attach(inner, config)
        _many(inner, name)
        return model
    roster = _roster(inner)
    _require_unmerged(inner)
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
                added.active = _active(inner)
            done.append(layer)
    except BaseException:
        for layer in done:
            many = cast("ManyLoRALinear", layer)
            if layer in fresh:
                many.to_base()
            else:
                many.remove(name)
        raise
    roster[name] = config
    return model


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Take one of several adapters off; of the last one :func:`~gauge_ext.detach` does.

    Raises:
        AdapterStateError: There is no such adapter, it is the only one, or the adapters are merged.
    """
    inner = unwrap(model)
    roster = _require_names(inner, [name])
    _require_unmerged(inner)
    if len(roster) == 1:
        raise AdapterStateError(
            f"{name!r} is the only adapter.", hint="Call gauge_ext.detach() to take it off."
        )
    remaining = tuple(pair for pair in _active(inner) if pair[0] != name)
    for layer in _many(inner).values():
        layer.active = remaining
        if layer.names == (name,):
            layer.to_base()
        elif name in layer.names:
            layer.remove(name)
    del roster[name]
    return model


def rename_adapter(model: ModelT, old: str, new: str) -> ModelT:
    """Call an adapter otherwise; its parameters stay the same objects.

    Raises:
        AdapterStateError: There is no adapter ``old``, or there is one called ``new``.
        ConfigError: The new name cannot be used.
    """
    inner = unwrap(model)
    roster = _require_names(inner, [old])
    _require_name(inner, new)
    for layer in _many(inner).values():
        layer.rename(old, new)
    renamed = {new if name == old else name: config for name, config in roster.items()}
    roster.clear()
    roster.update(renamed)
    return model


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on ``model``, the oldest first."""
    inner = unwrap(model)
    return tuple(_roster(inner)) if lora_layers(inner) else ()


def named_config(model: nn.Module, name: str) -> LoRAConfig:
    """Return the config of one adapter.

    Raises:
        AdapterStateError: There is no such adapter.
    """
    return _require_names(unwrap(model), [name])[name]


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that work, with their weights."""
    inner = unwrap(model)
    return dict(_active(inner)) if lora_layers(inner) else {}


def set_adapters(model: ModelT, names: str | Iterable[str] | Mapping[str, float]) -> ModelT:
    """Choose which adapters work; what they require of gradients is left alone.

    Args:
        model: A model with adapters.
        names: One name, several, or names with weights: the update is the sum of the updates, each
            times its weight. None at all: the base alone.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: There is no such adapter, or the adapters are merged.
        ConfigError: A weight is not a finite number.
    """
    inner = unwrap(model)
    weights = _weights(names)
    _require_names(inner, weights)
    _require_unmerged(inner)
    for layer in _many(inner).values():
        layer.active = tuple(weights.items())
    return model


@contextmanager
def use_adapters(
    model: nn.Module, names: str | Iterable[str] | Mapping[str, float]
) -> Iterator[None]:
    """Choose which adapters work for the length of a ``with``; see :func:`set_adapters`."""
    before = active_adapters(model)
    set_adapters(model, names)
    try:
        yield
    finally:
        set_adapters(model, before)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the base alone for the length of a ``with``, whatever kind of layer is adapted.

    Biases and whole modules that are trained (``bias``, ``modules_to_save``) belong to the base
    here: they stay as they are.

    Raises:
        AdapterStateError: There are no adapters, or they are merged.
    """
    inner = unwrap(model)
    attachment(inner)
    _require_unmerged(inner)
    working = [layer for layer in lora_layers(inner).values() if layer.has_branch]
    for layer in working:
        layer.has_branch = False
    try:
        yield
    finally:
        for layer in working:
            layer.has_branch = not layer.merged


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Give each sample of a batch an adapter of its own for the length of a ``with``.

    All samples go through the model together, and through each layer in one call of
    :func:`gauge_ext.ops.lora_gather`, with weight 1 each and gradients to every adapter in use.
    A model with named adapters takes the same list in each call, as it does in PEFT:
    ``model(x, adapter_names=[...])``, where PEFT's ``"__base__"`` stands for None too.

    Args:
        model: A model with adapters, whose layers see the batch as their first dimension.
        names: For each sample the adapter, or None for the base alone.

    Raises:
        AdapterStateError: There is no such adapter, or the adapters are merged.
    """
    inner = unwrap(model)
    used = tuple(dict.fromkeys(name for name in names if name is not None))
    _require_names(inner, used)
    _require_unmerged(inner)
    layers = _many(inner)
    for layer in layers.values():
        own = tuple(name for name in used if name in layer.names)
        place = {name: i for i, name in enumerate(own)}
        chosen = [-1 if name is None else place.get(name, -1) for name in names]
        layer.rows = own, torch.tensor(chosen, dtype=torch.int64)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.rows = None


def adapter_factors(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return what holds ``lora_A`` and ``lora_B`` of one adapter, by the path of the layer.

    Raises:
        AdapterStateError: There is no such adapter.
    """
    inner = unwrap(model)
    _require_names(inner, [name])
    found = {path: layer for path, layer in _many(inner).items() if name in layer.names}
    return {path: layer.adapter(name) for path, layer in found.items()}


def _roster(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configs by name, kept on the model; of one that was only attached, its own."""
    done = attachment(model)
    found: dict[str, LoRAConfig] = vars(model).setdefault(ROSTER, {DEFAULT: done.config})
    return found


def _many(model: nn.Module, name: str | None = None) -> dict[str, ManyLoRALinear]:
    """Return the layers, made fit for several adapters if they were not."""
    if name is not None:
        vars(model)[ROSTER] = {name: attachment(model).config}
    first = next(iter(_roster(model)))
    layers = lora_layers(model)
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear) or not layer.is_plain:
            raise TargetError(
                f"{path} is a {type(layer).__name__}, and several adapters, or none for a while, "
                "are for nn.Linear layers with two factors and nothing else.",
                hint="Attach to linear layers alone, without DoRA, lora_bias or a nonzero start.",
            )
    accept_row_names(model)
    return {
        path: ManyLoRALinear.adopt(cast("LoRALinear", layer), first)
        for path, layer in layers.items()
    }


def _active(model: nn.Module) -> tuple[tuple[str, float], ...]:
    for layer in lora_layers(model).values():
        if isinstance(layer, ManyLoRALinear):
            return layer.active
    return ((next(iter(_roster(model))), 1.0),)


def _find(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the layers that ``config`` means, whether they carry adapters or not."""
    present = _many(model)
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


def _weights(names: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(names, str):
        return {names: 1.0}
    if not isinstance(names, Mapping):
        return dict.fromkeys(names, 1.0)
    for name, weight in names.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight - weight != 0:
            raise ConfigError(f"the weight of {name!r} must be a finite number, got {weight!r}.")
    return {name: float(weight) for name, weight in names.items()}


def _require_names(model: nn.Module, names: Iterable[str]) -> dict[str, LoRAConfig]:
    roster = _roster(model)
    for name in names:
        if name not in roster:
            raise AdapterStateError(
                f"there is no adapter {name!r} on the model.",
                hint=f"There are: {', '.join(map(repr, roster))}.",
            )
    return roster


def _require_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ConfigError(f"an adapter's name must not be empty or hold '.' or '/', got {name!r}.")
    if hasattr(nn.ModuleDict, name):
        raise ConfigError(f"an adapter cannot be called {name!r}, which torch uses itself.")
    if name in adapter_names(model):
        raise AdapterStateError(
            f"there is an adapter {name!r} already.",
            hint="Give the new one another name, or delete_adapter() the old one.",
        )


def _require_unmerged(model: nn.Module) -> None:
    if any(layer.merged for layer in lora_layers(model).values()):
        raise AdapterStateError(
            "the model's adapters are merged.", hint="Call gauge_ext.unmerge() first."
        )


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
    if starts_nonzero(config.init):
        raise ConfigError(f"init={config.init!r} is for a model with a single adapter.")
