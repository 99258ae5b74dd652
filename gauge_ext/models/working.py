"""Which of the adapters on a model work: all the time, for a while, or for single rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from gauge_ext.adapters.rows import Rows
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
        given = [name for name in weights if name in module.names]
        if len(given) > 1:
            raise AdapterStateError(
                f"the module {path!r} can be that of one adapter at a time, and "
                f"{', '.join(map(repr, given))} each have one of their own (modules_to_save).",
                hint="Make one of them active. Samples of a batch can have different ones: "
                "adapter_rows().",
            )
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
    samples, added in one pass. DoRA and ``lora_bias`` go along. Of a whole module
    (``modules_to_save``) each sample gets its adapter's copy, or the base's own: one call for each
    copy that is asked for. Trained tokens are put in where a sample has them, here and where the
    table is tied.
    Where activations are checkpointed, call ``backward()`` within the ``with`` too, as they are
    computed again there.
    A model with named adapters takes the same list in each call, as it does in PEFT:
    ``model(x, adapter_names=[...])``, where PEFT's ``"__base__"`` stands for None too.

    Args:
        model: A model with adapters, whose layers see the batch as their first dimension.
        names: For each sample the adapter, or None for the base alone.

    Raises:
        AdapterStateError: There is no such adapter, the adapters are merged, or one of those named
            is on a layer that cannot tell samples apart: ``nn.MultiheadAttention``, a bare
            parameter. In the call: samples ask for different copies of a module
            (``modules_to_save``) that has several tensors as arguments, or returns anything but
            one tensor with the batch as its first dimension, or whose parameters are read from
            outside; or of a batch normalization in training.
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
    named = named_layers(inner)
    for path, each in named.items():
        names_here = tuple(name for name in used if name in each.names)
        place = {name: i for i, name in enumerate(names_here)}
        chosen = [-1 if name is None else place.get(name, -1) for name in names]
        each.set_rows(Rows(names_here, torch.tensor(chosen, dtype=torch.int64), path))
    try:
        yield
    finally:
        for each in named.values():
            each.set_rows(None)


def _weights(names: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(names, str):
        return {names: 1.0}
    if not isinstance(names, Mapping):
        return dict.fromkeys(names, 1.0)
    for name, weight in names.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight - weight != 0:
            raise ConfigError(f"the weight of {name!r} must be a finite number, got {weight!r}.")
    return {name: float(weight) for name, weight in names.items()}
