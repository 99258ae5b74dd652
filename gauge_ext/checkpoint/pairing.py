"""Which tensors of two models belong together, and which of them are linear layers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from gauge_ext.adapters import LoRAConfig, patterns
from gauge_ext.checkpoint.weights import Weights
from gauge_ext.errors import AdapterMismatchError, ConfigError, TargetError

# Their layers are transformers' Conv1D, whose weights lie transposed.
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Tables whose rows are looked up and not multiplied, and output embeddings, by the end of a path.
_TABLES = ("wte", "wpe", "shared", "lm_head", "embed_out", "relative_attention_bias")


def linear_names(weights: Weights) -> list[str]:
    """Guess the linear layers of a model whose classes aren't known, by names and shapes.

    Every ``<path>.weight`` that is a matrix of floating-point numbers, but for embeddings, which
    are known by their names (anything with "emb" in its last part, and a few others).

    Raises:
        ConfigError: The model is of a type that stores its weights transposed.
    """
    if (kind := weights.config.get("model_type")) in _TRANSPOSED:
        raise ConfigError(
            f"{weights.name} is a {kind}, whose layers are no nn.Linear: their weights are "
            "transposed, and adapters on them are not supported."
        )
    names = []
    for key, shape in weights.shapes.items():
        path, _, last = key.rpartition(".")
        tail = path.rpartition(".")[2]
        if last != "weight" or not path or len(shape) != 2 or key not in weights.dtypes:
            continue
        if "emb" not in tail.lower() and tail not in _TABLES:
            names.append(path)
    return names


def match_names(wanted: Iterable[str], there: Collection[str], what: str) -> dict[str, str]:
    """Find names in another model that may have a prefix more, or one less.

    A folder saved from a bare model lacks the prefix that the paths of a model with a head have
    (``bert.``, ``model.``). One prefix does for all names, the one that finds most of them; names
    that it does not find are left out.

    Args:
        wanted: Names of one model.
        there: Names of the other.
        what: The other model, for messages.

    Returns:
        Name in ``wanted`` -> name in ``there``.

    Raises:
        AdapterMismatchError: Two prefixes find equally many.
    """
    wanted, there = list(wanted), set(there)
    adds = {f"{name.partition('.')[0]}." for name in there}
    strips = {f"{name.partition('.')[0]}." for name in wanted}
    forms = [("", "")] + [("", add) for add in sorted(adds)] + [(s, "") for s in sorted(strips)]
    found: list[dict[str, str]] = []
    for strip, add in forms:
        renamed = {n: add + n[len(strip) :] for n in wanted if n.startswith(strip)}
        found.append({name: other for name, other in renamed.items() if other in there})
    best = max(found, key=len)
    # max takes the first, so that names that fit as they are come before all others.
    ties = [form for form in found if len(form) == len(best)]
    if best and best is not found[0] and len(ties) > 1:
        example = next(iter(best))
        raise AdapterMismatchError(
            f"{example!r} may be {best[example]!r} or {next(iter(ties[1].values()))!r} in {what}.",
            hint="Give two models that were saved as the same class.",
        )
    return best


def choose(candidates: Collection[str], config: LoRAConfig, where: str) -> list[str]:
    """Return the modules among ``candidates`` that ``config`` names.

    Raises:
        TargetError: A name of ``target_modules`` means none of them, or all are excluded.
    """
    targets = config.target_modules
    chosen = [name for name in candidates if config.selects(name)]
    if not isinstance(targets, str):
        lost = [t for t in targets if not any(patterns.name_selects(t, n) for n in candidates)]
        if lost:
            raise _no_target(lost, candidates, where)
    if not chosen:
        raise _no_target([targets] if isinstance(targets, str) else targets, candidates, where)
    return chosen


def _no_target(lost: Iterable[str], candidates: Collection[str], where: str) -> TargetError:
    lost = list(lost)
    tails = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    near = [
        f"{name!r} may be {match!r}"
        for name in lost
        for match in difflib.get_close_matches(name, [*tails, *candidates], n=1)
    ]
    known = ", ".join(tails[:12]) + (", ..." if len(tails) > 12 else "")
    return TargetError(
        f"target_modules {', '.join(map(repr, lost))} mean no linear layer of {where}.",
        hint=f"{'; '.join(near)}{'. ' if near else ''}Its linear layers end in: {known or 'none'}.",
    )
