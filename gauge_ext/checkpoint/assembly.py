"""Adapters that no training made: factors by module, with a config made to measure."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gauge_ext.adapters import LoRAConfig, patterns
from gauge_ext.checkpoint.digest import adapter_digest
from gauge_ext.checkpoint.fields import to_peft
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.errors import AdapterFormatError


def assemble(
    tensors: Mapping[str, LoRAPair],
    *,
    scaling: float = 1.0,
    like: LoRAConfig | None = None,
    modules: Collection[str] = (),
) -> AdapterCheckpoint:
    """Return factors as an adapter in memory; :func:`~gauge_ext.checkpoint.write_adapter` saves it.

    Args:
        tensors: Path of the module -> its factors, of any ranks.
        scaling: The scaling s of all modules; 1 where ``lora_B`` is the whole of B.
        like: See :func:`describe_pairs`.
        modules: See :func:`describe_pairs`.

    Raises:
        AdapterFormatError: There are no factors.
        ConfigError: ``scaling`` is not finite.
    """
    config = describe_pairs(tensors, scaling=scaling, like=like, modules=modules)
    ordered = dict(sorted(tensors.items()))
    digest = adapter_digest(config, ordered)
    return AdapterCheckpoint(config, ordered, Path(), to_peft(config), digest)


def describe_pairs(
    tensors: Mapping[str, LoRAPair],
    *,
    scaling: float | Mapping[str, float] = 1.0,
    like: LoRAConfig | None = None,
    modules: Collection[str] = (),
) -> LoRAConfig:
    """Return the config that gives exactly these modules these ranks, all with one scaling.

    The most frequent rank and scaling are ``rank`` and ``alpha / rank``; modules with others go to
    ``rank_pattern`` and ``alpha_pattern`` under their whole paths.

    Args:
        tensors: Path of the module -> its factors.
        scaling: s = alpha / rank of every module, or of each by its path.
        like: Where notes that change nothing are taken from: task, base, unknown fields.
        modules: Paths of other modules of the model, as far as they are known; the targets are
            their shortest names that mean none of those.

    Raises:
        AdapterFormatError: ``tensors`` is empty.
        ConfigError: ``scaling`` is not finite.
    """
    if not tensors:
        raise AdapterFormatError("an adapter needs the factors of at least one module, got none.")
    numbers = {
        name: (pair.rank, scaling[name] if isinstance(scaling, Mapping) else scaling)
        for name, pair in sorted(tensors.items())
    }
    counts = Counter(numbers.values())
    usual, scale = max(counts, key=lambda number: (counts[number], number))
    # Anchored: an expression is matched against the end of a path, and one may end in another.
    others = {
        f"^{re.escape(name)}": number
        for name, number in numbers.items()
        if number != (usual, scale)
    }
    return dataclasses.replace(
        like or LoRAConfig(),
        rank=usual,
        alpha=scale * usual,
        use_rslora=False,
        rank_pattern={name: rank for name, (rank, _) in others.items() if rank != usual},
        alpha_pattern={name: s * rank for name, (rank, s) in others.items()},
        target_modules=exact_targets(tensors, modules),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def exact_targets(wanted: Collection[str], modules: Collection[str]) -> str | Sequence[str]:
    """Return ``target_modules`` that mean ``wanted`` and none of ``modules`` beside.

    The last parts of the paths if that is exact, else whole paths, else an expression. With no
    ``modules`` known the last parts could mean anything, so whole paths are taken.
    """
    others = set(modules) - set(wanted)
    tails = list(dict.fromkeys(name.rpartition(".")[2] for name in sorted(wanted)))
    if modules and not any(patterns.selects(tails, name) for name in others):
        return tails
    whole = sorted(wanted)
    # Without a dot, a path may well be the end of another that isn't known here.
    bare = not modules and any("." not in name for name in whole)
    if not bare and not any(patterns.selects(whole, name) for name in others):
        return whole
    return "|".join(re.escape(name) for name in whole)
