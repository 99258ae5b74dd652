"""Several adapters on one model, under names: put on, taken off, called otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.whole import whole_modules
from gauge_ext.errors import AdapterStateError
from gauge_ext.models import whole
from gauge_ext.models.adapted import attachment, lora_layers, named_layers, record, unwrap
from gauge_ext.models.attach import attach
from gauge_ext.models.roster import active_pairs, require_names, require_new_name, require_unmerged
from gauge_ext.models.row_names import accept_row_names

ModelT = TypeVar("ModelT", bound=nn.Module)


def add_adapter(model: ModelT, config: LoRAConfig, name: str) -> ModelT:
    """Put an adapter on a model under a name: :func:`~gauge_ext.attach`, as PEFT calls it.

    Args:
        model: A bare model, or one with adapters.
        config: Which layers, which rank, which scale.
        name: Not empty, without a dot or a slash.

    Returns:
        ``model``.

    Raises:
        TargetError: See :func:`~gauge_ext.attach`, as for ConfigError and AdapterStateError.
    """
    return attach(model, config, name)


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Take one of several adapters off; of the last one :func:`~gauge_ext.detach` does.

    With it go its copies of whole modules, and the biases that it trained.

    Raises:
        AdapterStateError: There is no such adapter, it is the only one, or the adapters are merged.
    """
    inner = unwrap(model)
    require_names(inner, [name])
    require_unmerged(inner)
    done = attachment(inner)
    if len(done.configs) == 1:
        raise AdapterStateError(
            f"{name!r} is the only adapter.", hint="Call gauge_ext.detach() to take it off."
        )
    oldest = next(iter(done.configs))
    remaining = tuple(pair for pair in active_pairs(inner) if pair[0] != name)
    for layer in lora_layers(inner).values():
        if layer.names == (name,):
            layer.to_base()
            continue
        if name in layer.names:
            layer.remove(name)
        layer.set_active(remaining)
    whole.drop_modules(inner, name)
    for module in whole_modules(inner).values():
        module.set_active(remaining)
    if name == oldest:
        whole.restore(inner, done.whole)
    now = replace(
        done,
        configs={key: config for key, config in done.configs.items() if key != name},
        names=tuple(lora_layers(inner)),
        whole={} if name == oldest else done.whole,
    )
    record(inner, now)
    return model


def rename_adapter(model: ModelT, old: str, new: str) -> ModelT:
    """Call an adapter otherwise; its parameters stay the same objects.

    Raises:
        AdapterStateError: There is no adapter ``old``, or there is one called ``new``.
        ConfigError: The new name cannot be used.
    """
    inner = unwrap(model)
    require_names(inner, [old])
    require_new_name(inner, new)
    for layer in named_layers(inner).values():
        layer.rename(old, new)
    done = attachment(inner)
    configs = {new if key == old else key: config for key, config in done.configs.items()}
    record(inner, replace(done, configs=configs))
    accept_row_names(inner)
    return model
