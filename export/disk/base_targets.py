"""The weights of a base folder that an adapter changes: found by name, held against its shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.export.disk.base_folder import BaseFolder
from gauge_ext.export.disk.naming import best_renamings
from gauge_ext.export.disk.numbers import BY_SAFETENSORS
from gauge_ext.export.disk.safetensors_file import Stored
from gauge_ext.export.patching.update import WeightShape

_UNTIE = "Merge in memory with gauge_ext.merge(), and save with config.tie_word_embeddings = False."
# Families whose linear layers are transformers' Conv1D, which stores weights (in, out).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gptsan-japanese"}


@dataclass(frozen=True)
class Target:
    """A weight that an adapter changes.

    Attributes:
        module: Path of the module.
        stored: Where it lies.
        transposed: Whether it lies ``(in, out)``.
        is_bias: Whether it is the module's bias.
    """

    module: str
    stored: Stored
    transposed: bool
    is_bias: bool = False


def base_weights(base: BaseFolder, modules: Sequence[str]) -> dict[str, str]:
    """Finds the name of the tensor that each module's weight is stored under.

    A folder saved from the bare model lacks the prefix that the paths of a model with a head have
    (``bert.``, ``model.``), or the other way round; one prefix has to do for all modules.

    Returns:
        Path of the module -> name of the tensor.

    Raises:
        AdapterMismatchError: a module has no tensor, or it cannot be told which.
    """
    known = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
    rules = best_renamings(modules, known)
    if len(rules) != 1 or any(rules[0](module) not in known for module in modules):
        raise _mismatch(base, list(modules), ambiguous=len(rules) > 1)
    return {module: f"{rules[0](module)}.weight" for module in modules}


def match_targets(
    base: BaseFolder,
    weights: Mapping[str, WeightShape],
    biases: Collection[str] = (),
    *,
    may_lie_transposed: bool,
    tied: Mapping[str, str] | None = None,
) -> dict[str, Target]:
    """Finds the tensor that each adapted module's weight is stored in.

    Args:
        base: The folder.
        weights: Path of the module -> its weight.
        biases: The modules whose bias is wanted too.
        may_lie_transposed: Whether the adapter says that weights of linear layers lie ``(in, out)``
            (``fan_in_fan_out``); each shape then says whether that is so.
        tied: Path of each module whose weight gets the same update as an embedding's -> the
            embedding's. Where the folder says that they are one weight, they stay it.

    Returns:
        Name of the tensor -> the target.

    Raises:
        AdapterMismatchError: a module has no tensor, or one of another shape.
        ConfigError: a tensor is of a dtype that cannot be merged.
    """
    alike = {*(tied or {}), *(tied or {}).values()}
    if tied and _ties(base):
        weights = {m: w for m, w in weights.items() if m not in tied or _is_stored(base, m)}
    names = base_weights(base, list(weights))
    linear = {m: w.matrix for m, w in weights.items() if w.kind == "linear"}
    square = any(rows == columns for rows, columns in linear.values())
    turned = may_lie_transposed and square and _square_ones_lie_transposed(base, names, linear)
    targets = {}
    for module, name in names.items():
        stored, weight = base.tensors[name], weights[module]
        transposed = weight.kind == "embedding"
        if module in linear and may_lie_transposed:
            rows, columns = weight.matrix
            transposed = turned if rows == columns else stored.shape == (columns, rows)
        fits = stored.shape == weight.stored or (module in linear and transposed)
        if not fits:
            raise AdapterMismatchError(
                f"the adapter for {module!r} is for a weight of shape {weight.stored}, and {name} "
                f"in {base.path} has shape {stored.shape}.",
                hint="Is this the base that the adapter was trained on?",
            )
        _require_numbers(base, name, stored)
        if module not in alike and _is_tied(base, stored):
            what = (
                f"the input embeddings, which {base.path} ties to its output layer: that would "
                "change with them."
                if weight.kind == "embedding"
                else f"the output layer, which {base.path} ties to its input embeddings: "
                "transformers would load it without the merged weight."
            )
            raise AdapterMismatchError(f"the adapter's {module!r} is {what}", hint=_UNTIE)
        targets[name] = Target(module, stored, transposed)
    for module in biases:
        name = f"{names[module].removesuffix('.weight')}.bias"
        bias, out = base.tensors.get(name), weights[module].matrix[0]
        if bias is None or bias.shape != (out,):
            raise AdapterMismatchError(
                f"the adapter has a bias of {out} numbers for {module!r} (lora_bias), and "
                f"{base.path} has {f'{name} of shape {bias.shape}' if bias else f'no {name}'}.",
                hint="Is this the base that the adapter was trained on?",
            )
        _require_numbers(base, name, bias)
        targets[name] = Target(module, bias, transposed=False, is_bias=True)
    return targets


def _require_numbers(base: BaseFolder, name: str, stored: Stored) -> None:
    if stored.dtype not in BY_SAFETENSORS:
        raise ConfigError(
            f"{name} in {base.path} is stored as {stored.dtype}, and an update can be "
            f"added to {', '.join(BY_SAFETENSORS)} only.",
            hint="Merge into the unquantized base.",
        )


def _square_ones_lie_transposed(
    base: BaseFolder, names: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]
) -> bool:
    """Whether square weights lie ``(in, out)``: as the others do, in a model that has Conv1D.

    An adapter may say ``fan_in_fan_out`` for layers that are none: PEFT ignores it there.

    Raises:
        ConfigError: all weights are square, and the family is not known.
    """
    if base.config.get("model_type") in _CONV1D:
        return True
    others = [m for m, (rows, columns) in shapes.items() if rows != columns]
    if not others:
        raise ConfigError(
            f"the adapter says fan_in_fan_out, and every weight of it in {base.path} is square: "
            "which way they lie cannot be seen.",
            hint="If the layers are nn.Linear, set it to false in adapter_config.json; else merge "
            "in memory with gauge_ext.merge().",
        )
    return any(base.tensors[names[module]].shape == shapes[module][::-1] for module in others)


def _is_tied(base: BaseFolder, stored: Stored) -> bool:
    """Whether a weight has a row for each token, in a model that says that those are tied."""
    text = base.config.get("text_config", base.config)
    return _ties(base) and stored.shape[0] == text.get("vocab_size")


def _ties(base: BaseFolder) -> bool:
    """Whether the folder says that input and output embeddings are one weight."""
    text = base.config.get("text_config", base.config)
    return bool(base.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _is_stored(base: BaseFolder, module: str) -> bool:
    """Whether a tensor has the name of a module, whatever stands before its last part."""
    last = f"{module.rpartition('.')[2]}.weight"
    return any(name == last or name.endswith(f".{last}") for name in base.tensors)


def _mismatch(base: BaseFolder, modules: list[str], *, ambiguous: bool) -> AdapterMismatchError:
    if ambiguous:
        return AdapterMismatchError(
            f"the adapter's {modules[0]!r} fits several tensors of {base.path}.",
            hint="Merge in memory with gauge_ext.merge() instead.",
        )
    missing = [module for module in modules if f"{module}.weight" not in base.tensors]
    shown = ", ".join(repr(module) for module in missing[:4]) + (", ..." if missing[4:] else "")
    if len(missing) < len(modules) and base.config.get("tie_word_embeddings", False):
        hint = f"This base ties its output to its input embeddings, stored once. {_UNTIE}"
    else:
        hint = (
            "Is this the base that the adapter was trained on? Its tensors are named like "
            f"{next(iter(base.tensors))!r}."
        )
    return AdapterMismatchError(
        f"{len(missing)} of the adapter's {len(modules)} modules have no weight in {base.path}: "
        f"{shown}.",
        hint=hint,
    )
