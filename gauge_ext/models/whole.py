"""Parameters of the base that are trained whole beside the adapters: modules_to_save and biases.

The base's own Parameter is never trained: a copy takes its place, so that other models that share
it stay as they are, and :func:`restore` puts the very same object back.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from gauge_ext.adapters import LoRAConfig, patterns
from gauge_ext.errors import TargetError


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of the modules that ``modules_to_save`` names.

    Raises:
        TargetError: A name means no module.
    """
    if config.modules_to_save is None:
        return []
    names = [name for name, _ in model.named_modules() if name]
    for entry in config.modules_to_save:
        if not any(patterns.name_selects(entry, name) for name in names):
            raise TargetError(
                f"modules_to_save names {entry!r}, and no module of {type(model).__name__} is "
                "called so.",
                hint="Give the last part of a module's path, such as 'classifier'.",
            )
    return [name for name in names if patterns.selects(config.modules_to_save, name)]


def chosen(model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> list[str]:
    """Return the paths of the parameters that ``config`` wants trained whole.

    Args:
        model: The model, with or without its adapters.
        config: Its ``modules_to_save`` and ``bias``.
        adapted: Paths of the adapted layers.
    """
    modules = saved_modules(model, config)

    def wanted(path: str) -> bool:
        holder, _, name = path.rpartition(".")
        if any(path.startswith(f"{module}.") for module in modules):
            return True
        # As PEFT has it, which also means nn.MultiheadAttention's in_proj_bias.
        is_bias = "bias" in name and name != "lora_bias"
        return is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and holder in adapted)
        )

    every = list(model.named_parameters(remove_duplicate=False))
    tied: set[int] = set()
    if config.ensure_weight_tying:
        within = {path for path, _ in every if any(path.startswith(f"{m}.") for m in modules)}
        tied = {id(parameter) for path, parameter in every if path in within}
    return [path for path, parameter in every if wanted(path) or id(parameter) in tied]


def replace(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """Put a trainable copy in the place of each parameter; those that were one stay one.

    A warning tells of a parameter that is tied to one that stays, such as an output embedding.

    Returns:
        Path -> the base's own Parameter, for :func:`restore`.
    """
    paths = list(paths)
    _warn_of_ties(model, paths)
    own: dict[str, nn.Parameter] = {}
    copies: dict[int, nn.Parameter] = {}
    for path in paths:
        base = own[path] = model.get_parameter(path)
        if id(base) not in copies:
            copies[id(base)] = nn.Parameter(base.detach().clone(), requires_grad=True)
        _put(model, path, copies[id(base)])
    return own


def _warn_of_ties(model: nn.Module, paths: Collection[str]) -> None:
    replaced = {id(model.get_parameter(path)): path for path in paths}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if (twin := replaced.get(id(parameter))) is not None and path not in paths:
            warnings.warn(
                f"{twin!r} gets values of its own, and was tied to {path!r}, which keeps the "
                "base's: from here on they are two. To keep them one, name both in "
                "modules_to_save.",
                stacklevel=5,
            )


def restore(model: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
    """Put back what :func:`replace` took out."""
    for path, base in own.items():
        _put(model, path, base)


def _put(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, parameter)
