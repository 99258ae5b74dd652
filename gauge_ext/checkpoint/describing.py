"""The config of an adapter on a model, with targets that mean its layers to every reader."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

from torch import nn

from gauge_ext.adapters import LoRAConfig, WrappedAdapter, patterns, variant_for
from gauge_ext.models.adapted import base_modules
from gauge_ext.models.tied import tied_layers

# Names of the modules whose base weight PEFT saves along where they are adapted.
EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})


def describe(model: nn.Module, config: LoRAConfig, layers: Collection[str]) -> LoRAConfig:
    """Return ``config`` with targets that mean exactly ``layers`` to every reader.

    "all-linear" is spelled out, as PEFT does: readers differ in what they leave out. The shortest
    form is chosen that is exact: last parts of the paths, else whole paths, else an expression.
    """
    names = plain_paths(model)
    able = {
        name
        for name, m in base_modules(model).items()
        if name in layers or ((variant := variant_for(m)) and variant.kind != "out_proj")
    }
    meant = {name for name in able if config.selects(name)}
    if heads := {name for name in tied_layers(model) if name in layers} - meant:
        meant |= heads if _are_tied_by_peft(model, config, heads) else set()
    if not config.is_all_linear and meant == set(layers):
        return config
    tails: dict[str, bool] = {}
    for name in names:
        tail = name.rpartition(".")[2]
        tails[tail] = tails.get(tail, True) and name in layers
    ends = [(name, name.rpartition(".")[2]) for name in layers]
    targets: Sequence[str] = [tail if tails[tail] else name for name, tail in ends]
    if {name for name in names if patterns.selects(targets, name)} != set(layers):
        targets = "|".join(re.escape(name) for name in layers)
    return dataclasses.replace(
        config,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _are_tied_by_peft(model: nn.Module, config: LoRAConfig, heads: Collection[str]) -> bool:
    """Whether PEFT finds by itself, without their names, that these have the embedding's adapter.

    It does where a target has one of two names, and the model's class says that they are tied.
    """
    targets, keys = config.target_modules, getattr(model, "_tied_weights_keys", None) or ()
    ends = [targets] if isinstance(targets, str) else [t.rpartition(".")[2] for t in targets]
    named = any(re.fullmatch(end, name) for end in ends for name in EMBEDDINGS)
    return named and all(f"{head}.weight" in keys for head in heads)


def plain_paths(model: nn.Module) -> list[str]:
    """Return the paths of a model's modules as they are without adapters that hold their base."""
    wrapped = [name for name, m in model.named_modules() if isinstance(m, WrappedAdapter)]
    return [
        name
        for name in base_modules(model)
        if name and not any(name.startswith(f"{path}." if path else "") for path in wrapped)
    ]
