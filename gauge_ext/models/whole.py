"""Parameters of the base that are trained whole beside the adapters: modules_to_save and biases.

The base's own Parameter is never trained: a copy takes its place, so that other models that share
it stay as they are, and the very same object comes back. Of a module to save each adapter has
copies of its own, which are read while it works (:func:`save_modules`); trained biases are the
first adapter's, and stand in the base's place all the time (:func:`replace`, :func:`restore`).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from gauge_ext.adapters import AdaptedLayer, LoRAConfig, patterns
from gauge_ext.adapters.parameter import LoRAHolder
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.adapters.whole import WholeModule, become_whole, whole_modules
from gauge_ext.errors import TargetError
from gauge_ext.models.adapted import KEY, Attachment, base_modules


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of the modules that ``modules_to_save`` names.

    Raises:
        TargetError: A name means no module.
    """
    if config.modules_to_save is None:
        return []
    names = [name for name in base_modules(model) if name]
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
    saved = {path for path, _ in _to_save(model, config)}

    def trained_bias(path: str) -> bool:
        holder, _, name = path.rpartition(".")
        # As PEFT has it, which also means nn.MultiheadAttention's in_proj_bias.
        is_bias = "bias" in name and name != "lora_bias"
        return is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and holder in adapted)
        )

    every = model.named_parameters(remove_duplicate=False)
    return [path for path, _ in every if path in saved or trained_bias(path)]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's own parameters by path, also where adapters have copies of them."""
    found: dict[str, nn.Parameter] = {}
    for path, module in base_modules(model).items():
        own = module.own_names() if isinstance(module, AdaptedLayer) else ()
        base = module.own_parameters if isinstance(module, WholeModule) else {}
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in own:
                found[f"{path}.{name}" if path else name] = base.get(name, parameter)
    return found


def _to_save(model: nn.Module, config: LoRAConfig) -> list[tuple[str, nn.Parameter]]:
    """The base's own parameters in the modules to save, and those that are to stay tied to them."""
    modules = saved_modules(model, config)
    every = base_parameters(model)
    found = {p for p in every if any(p.startswith(f"{module}.") for module in modules)}
    tied = {id(every[path]) for path in found} if config.ensure_weight_tying else set()
    return [(path, p) for path, p in every.items() if path in found or id(p) in tied]


def save_modules(model: nn.Module, config: LoRAConfig, name: str) -> list[WholeModule]:
    """Give an adapter trainable copies of the modules that ``modules_to_save`` names.

    A parameter under several paths gets one copy. A warning tells of one that is tied to a
    parameter that stays, such as an output embedding.

    Returns:
        The modules that hold the copies.

    Raises:
        TargetError: One of them is adapted in place already, by this adapter or another, or holds
            a parameter to which another gave values of its own in the base's place.
    """
    chosen = dict(_to_save(model, config))
    done: Attachment | None = vars(model).get(KEY)
    if done is not None and (taken := next((p for p in chosen if p in done.whole), None)):
        raise TargetError(
            f"modules_to_save of the adapter {name!r} means {taken!r}, in whose place the adapter "
            f"{next(iter(done.configs))!r} has a trained bias, or values from its file.",
            hint="Give all adapters bias='none', or put this one on a copy of the model.",
        )
    modules = dict(model.named_modules())
    copies: dict[int, nn.Parameter] = {}
    held: dict[str, dict[str, nn.Parameter]] = {}
    for path, base in chosen.items():
        holder, _, last = path.rpartition(".")
        if isinstance(there := modules[holder], AdaptedLayer | LoRAHolder | TiedLinear):
            adapted = there.source if isinstance(there, TiedLinear) else there
            others = next((m.names for m in adapted.modules() if isinstance(m, AdaptedLayer)), ())
            raise TargetError(
                f"modules_to_save of the adapter {name!r} means {path!r}, and {holder!r} is "
                f"adapted in place by {', '.join(map(repr, others))}.",
                hint="A module is either adapted or saved, by all adapters on the model.",
            )
        if id(base) not in copies:
            copies[id(base)] = nn.Parameter(base.detach().clone(), requires_grad=True)
        held.setdefault(holder, {})[last] = copies[id(base)]
    _warn_of_ties(base_parameters(model), chosen)
    found = []
    for holder, own in held.items():
        module = modules[holder]
        if isinstance(module, WholeModule):
            module.add(name, own)
        else:
            module = become_whole(module, name, own)
        found.append(module)
    for base in chosen.values():
        base.requires_grad_(False)
    return found


def drop_modules(model: nn.Module, name: str) -> None:
    """Take an adapter's copies away; a module that has no others is the base's again."""
    for module in whole_modules(model).values():
        if module.names == (name,):
            module.put_back()
        elif name in module.names:
            module.remove(name)


def replace(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """Put a trainable copy in the place of each parameter; those that were one stay one.

    A warning tells of a parameter that is tied to one that stays, such as an output embedding.

    Returns:
        Path -> the base's own Parameter, for :func:`restore`.
    """
    paths = list(paths)
    _warn_of_ties(dict(model.named_parameters(remove_duplicate=False)), paths)
    own: dict[str, nn.Parameter] = {}
    copies: dict[int, nn.Parameter] = {}
    for path in paths:
        base = own[path] = model.get_parameter(path)
        if id(base) not in copies:
            copies[id(base)] = nn.Parameter(base.detach().clone(), requires_grad=True)
        _put(model, path, copies[id(base)])
    return own


def _warn_of_ties(every: Mapping[str, nn.Parameter], paths: Collection[str]) -> None:
    replaced = {id(every[path]): path for path in paths}
    for path, parameter in every.items():
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
