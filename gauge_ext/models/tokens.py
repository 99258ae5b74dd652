"""Rows of embeddings that are trained whole, on a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from gauge_ext.adapters import AdaptedLayer, LoRAConfig, patterns
from gauge_ext.adapters.tokens import TOKENS, TrainedTokens
from gauge_ext.adapters.whole import WholeModule
from gauge_ext.errors import TargetError
from gauge_ext.models.adapted import base_modules

_OTHERS = (AdaptedLayer, WholeModule)


def train_tokens(
    model: nn.Module,
    config: LoRAConfig,
    taken: Collection[nn.Module],
    whole: Collection[str],
    name: str,
) -> tuple[list[TrainedTokens], list[TrainedTokens]]:
    """Put the rows that ``trainable_token_indices`` means beside their tables.

    Args:
        model: The model.
        config: Its description.
        taken: The modules with an adapter.
        whole: Paths of the parameters that are trained whole.
        name: What the adapter is called.

    Returns:
        Those that are fresh, and those in which a further adapter's rows lie now.

    Raises:
        TargetError: A name means no embedding, or one that is adapted or trained whole, by this
            adapter or another.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return [], []
    modules = base_modules(model)
    if isinstance(wanted, Mapping):
        found = {
            path: ids
            for entry, ids in wanted.items()
            for path in modules
            if patterns.name_selects(entry, path)
        }
        if lost := [n for n in wanted if not any(patterns.name_selects(n, path) for path in found)]:
            raise TargetError(f"trainable_token_indices names {lost[0]!r}, which is no module.")
    else:
        getter = getattr(model, "get_input_embeddings", None)
        table = getter() if callable(getter) else None
        found = {path: wanted for path, module in modules.items() if module is table}
        if not found:
            raise TargetError(
                f"this {type(model).__name__} doesn't tell which is its input embedding.",
                hint='Give trainable_token_indices by name: {"embed_tokens": [...]}.',
            )
    done: list[TrainedTokens] = []
    beside: list[TrainedTokens] = []
    try:
        for path, ids in found.items():
            weight = modules[path]._parameters.get("weight")
            tied = [m for m in modules.values() if m._parameters.get("weight") is weight]
            owners = [modules[path], *(m for m in tied if m is not modules[path])]
            names = [f"{place}.weight" for place, m in modules.items() if m in owners]
            other = any(owner in taken or isinstance(owner, _OTHERS) for owner in owners)
            if other or {*names} & {*whole}:
                raise TargetError(
                    f"trainable_token_indices means {path!r}, whose table has an adapter or is "
                    "trained whole, here or where it is tied.",
                    hint="Choose one of target_modules, modules_to_save, trainable_token_indices.",
                )
            present = modules[path]._modules.get(TOKENS)
            if isinstance(present, TrainedTokens):
                present.add_rows(name, ids)
                beside.append(present)
            elif any("_tied" in vars(owner) for owner in owners):
                raise TargetError(
                    f"trainable_token_indices means {path!r}, and another adapter trains tokens of "
                    "its table where it is tied.",
                    hint="Name the same module in both.",
                )
            else:
                done.append(TrainedTokens(owners, ids, name))
    except BaseException:
        for rows in done:
            rows.to_base()
        for rows in beside:
            rows.remove(name)
        raise
    return done, beside
