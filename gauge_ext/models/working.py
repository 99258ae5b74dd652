"""Which of the adapters on a model work: all the time, for a while, or for single rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from gauge_ext.adapters.whole import whole_modules
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models.adapted import attachment, lora_layers, named_layers, unwrap
from gauge_ext.models.roster import active_pairs, require_names, require_unmerged

ModelT = TypeVar("ModelT", bound=nn.Module)


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that work, with their weights."""
    inner = unwrap(model)
    return dict(active_pairs(inner)) if lora_layers(inner) else {}


def set_adapters(model: ModelT, names: str | Iterable[str] | Mapping[str, float]) -> ModelT:
    """Choose which adapters work; what they require of gradients is left alone.

    Args:
        model: A model with adapters.
        names: One name, several, or names with weights: the update is the sum of the updates, each
            times its weight. None at all: the base alone. A module of ``modules_to_save`` is that
            of the adapter which has one, whatever its weight.

    Returns:
        ``model``.

    Raises:
        AdapterStateError: There is no such adapter, the adapters are merged, or two of them have
            copies of one module (``modules_to_save``), of which but one can be used.
        ConfigError: A weight is not a finite number.
    """
    inner = unwrap(model)
    weights = _weights(names)
    require_names(inner, weights)
    require_unmerged(inner)
    for path, module in whole_modules(inner).items():
        _require_one_copy(path, [name for name in weights if name in module.names])
    for layer in named_layers(inner).values():
        layer.set_active(tuple(weights.items()))
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

    Modules of ``modules_to_save`` are the base's own then. Biases that are trained (``bias``)
    belong to the base here, as in PEFT: they stay as they are.

    Raises:
        AdapterStateError: There are no adapters, or they are merged.
    """
    inner = unwrap(model)
    attachment(inner)
    require_unmerged(inner)
    working = [layer for layer in named_layers(inner).values() if not layer.disabled]
    for layer in working:
        layer.set_disabled(True)
    try:
        yield
    finally:
        for layer in working:
            layer.set_disabled(False)


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Give each sample of a batch an adapter of its own for the length of a ``with``.

    All samples go through the model together, with weight 1 each and gradients to every adapter in
    use: through each linear layer in one call of :func:`gauge_ext.ops.lora_gather`, through
    embeddings, convolutions and quantized layers with the base once and each adapter on its own
    samples, added in one pass. DoRA and ``lora_bias`` go along.
    A model with named adapters takes the same list in each call, as it does in PEFT:
    ``model(x, adapter_names=[...])``, where PEFT's ``"__base__"`` stands for None too.

    Args:
        model: A model with adapters, whose layers see the batch as their first dimension.
        names: For each sample the adapter, or None for the base alone.

    Raises:
        AdapterStateError: There is no such adapter, the adapters are merged, or one of those named
            is on a layer that cannot tell samples apart: ``nn.MultiheadAttention``, a bare
            parameter, trained tokens; or samples ask for different copies of one module
            (``modules_to_save``).
    """
    inner = unwrap(model)
    used = tuple(dict.fromkeys(name for name in names if name is not None))
    require_names(inner, used)
    require_unmerged(inner)
    layers = lora_layers(inner)
    for path, layer in layers.items():
        own = next((name for name in used if name in layer.names), None)
        if own is not None and layer.rows_refusal is not None:
            raise AdapterStateError(
                f"the samples of a batch cannot have adapters of their own at {path!r}, which "
                f"{own!r} adapts: {layer.rows_refusal}.",
                hint="Call the model once for each adapter, with use_adapters(), or leave this "
                "layer out of the adapters' targets.",
            )
    for path, module in whole_modules(inner).items():
        _require_one_copy(path, [n if n in module.names else None for n in dict.fromkeys(names)])
    named = named_layers(inner).values()
    for each in named:
        names_here = tuple(name for name in used if name in each.names)
        place = {name: i for i, name in enumerate(names_here)}
        chosen = [-1 if name is None else place.get(name, -1) for name in names]
        each.set_rows((names_here, torch.tensor(chosen, dtype=torch.int64)))
    try:
        yield
    finally:
        for each in named:
            each.set_rows(None)


def _require_one_copy(path: str, wanted: Sequence[str | None]) -> None:
    """Refuse that several adapters, or one and the base, give the module at ``path`` at once."""
    given = dict.fromkeys(wanted)
    if len(given) > 1:
        shown = ", ".join("the base" if name is None else repr(name) for name in given)
        raise AdapterStateError(
            f"the module {path!r} can be that of one adapter at a time, and {shown} each have one "
            "of their own (modules_to_save).",
            hint="Make one of them active, and call the model once for each.",
        )


def _weights(names: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(names, str):
        return {names: 1.0}
    if not isinstance(names, Mapping):
        return dict.fromkeys(names, 1.0)
    for name, weight in names.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight - weight != 0:
            raise ConfigError(f"the weight of {name!r} must be a finite number, got {weight!r}.")
    return {name: float(weight) for name, weight in names.items()}
