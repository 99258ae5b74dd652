"""Adapters on an embedding and the output layers tied to it: ``ensure_weight_tying``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from gauge_ext.adapters import LoRAConfig, patterns
from gauge_ext.adapters.embedding import LoRAEmbedding
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.errors import TargetError
from gauge_ext.models.adapted import base_modules, unwrap


def tied_layers(model: nn.Module) -> dict[str, TiedLinear]:
    """Return the layers that have the adapters of the embedding they are tied to, by path."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, TiedLinear)}


def sharers(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the modules that share one ``weight``, by path, for each weight of several."""
    found: dict[int, dict[str, nn.Module]] = {}
    for path, module in base_modules(model).items():
        if (weight := module._parameters.get("weight")) is not None:
            found.setdefault(id(weight), {})[path] = module
    return [modules for modules in found.values() if len(modules) > 1]


def tie_targets(
    model: nn.Module, config: LoRAConfig, layers: Collection[str], whole: Collection[str]
) -> dict[str, str]:
    """Find the layers that are to have the adapter of the embedding that they are tied to.

    Args:
        model: The model.
        config: Its ``ensure_weight_tying`` is set.
        layers: Paths of the layers that the config means.
        whole: Paths of the modules that are trained whole.

    Returns:
        Path of each such layer -> that of the embedding. Where one of those that share a weight is
        meant, all are.

    Raises:
        TargetError: A weight that is meant is shared by others than one embedding and plain linear
            layers, is trained whole, or the config says different things of those that share it.
    """
    tied: dict[str, str] = {}
    for group in sharers(model):
        meant = next((path for path in group if path in layers), None)
        if meant is None:
            continue
        tables = [p for p, m in group.items() if type(m) in (nn.Embedding, LoRAEmbedding)]
        heads = [p for p, m in group.items() if type(m) in (nn.Linear, TiedLinear)]
        other = next(path for path in group if path != meant)
        reason = None
        if len(tables) != 1 or len(tables) + len(heads) < len(group):
            kinds = ", ".join(f"{type(m).__name__} {path!r}" for path, m in group.items())
            reason = f"an nn.Embedding and nn.Linear layers can be tied, and these are {kinds}"
        elif any(path == m or path.startswith(f"{m}.") for path in group for m in whole):
            reason = "modules_to_save has it trained whole"
        elif config.use_dora:
            reason = "DoRA would train lengths of the table's columns in one, of its rows in others"
        elif any(config.spec_for(path) != config.spec_for(tables[0]) for path in heads):
            reason = "rank_pattern or alpha_pattern gives them different ranks or scales"
        if reason is not None:
            raise TargetError(
                f"ensure_weight_tying is on, and the adapter on {meant!r} would untie it from "
                f"{other!r}: {reason}.",
                hint="Train it whole (modules_to_save), or with ensure_weight_tying=False.",
            )
        tied |= dict.fromkeys(heads, tables[0])
    return tied


def named_by_embedding(model: nn.Module, config: LoRAConfig, tied: Mapping[str, str]) -> LoRAConfig:
    """Return ``config`` with the embedding among its names in the place of what is tied to it.

    It is what PEFT makes of ``target_modules``; an expression stays as it is.
    """
    targets = config.target_modules
    if isinstance(targets, str) or not tied:
        return config
    paths = list(base_modules(model))
    kept = [
        entry
        for entry in targets
        if not (named := [path for path in paths if patterns.name_selects(entry, path)])
        or not set(named) <= set(tied)
    ]
    lacking = [t for t in dict.fromkeys(tied.values()) if not patterns.selects(kept, t)]
    return replace(config, target_modules=[*kept, *lacking])


def require_same_ties(layers: Mapping[str, nn.Module], tied: Mapping[str, str], name: str) -> None:
    """Refuse a further adapter that is tied where the present ones are not, or the other way.

    Raises:
        TargetError: So it is.
    """
    for path, layer in layers.items():
        if isinstance(layer, LoRAEmbedding) and bool(layer.heads) != (path in tied.values()):
            there = "are" if layer.heads else "are not"
            raise TargetError(
                f"the adapters {', '.join(map(repr, layer.names))} on {path!r} {there} tied to its "
                f"output layer (ensure_weight_tying), and {name!r} is to be otherwise.",
                hint="Give all adapters of it the same ensure_weight_tying.",
            )
