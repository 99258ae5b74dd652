"""Which modules of a model an adapter's config means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from gauge_ext.adapters import patterns
from gauge_ext.adapters.config import LoRAConfig
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.parameter import reason_against_parameter
from gauge_ext.adapters.registry import unsupported_reason, variant_for
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.adapters.whole import WholeModule
from gauge_ext.errors import TargetError
from gauge_ext.models.adapted import base_modules
from gauge_ext.models.tied import tie_targets
from gauge_ext.models.whole import saved_modules

# Where transformers keeps the head of a sequence classifier, which "all-linear" leaves out for the
# task SEQ_CLS, as PEFT does: a fresh head has to be trained whole.
_CLASSIFIER_HEADS = ("score", "classifier")

# What transformers calls the modules that hold the weights of experts, and choose among them.
_EXPERTS = ("Experts", "Router")

# The fused kernels of these architectures read the weight of out_proj and never call it.
_MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


@dataclass(frozen=True)
class TargetMatch:
    """The modules that a config means in one model.

    Attributes:
        layers: The layers to be adapted, by path, in the model's order.
        skipped: Layers, and the stacked weights of experts, that "all-linear" or
            ``modules_to_save`` left out -> why.
        unmatched: Names in ``target_modules`` that no module answers to.
        parameters: The parameters to be adapted, by path: the modules that hold them.
        bare_experts: Those of ``skipped`` that are weights of experts and routers.
        tied: Path of each layer that has the adapter of the embedding it is tied to -> that.
    """

    layers: dict[str, nn.Module]
    skipped: dict[str, str]
    unmatched: tuple[str, ...]
    parameters: dict[str, nn.Module]
    bare_experts: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)


def find_targets(model: nn.Module, config: LoRAConfig) -> TargetMatch:
    """Find the modules of ``model`` that ``config`` means, by PEFT's rules.

    A module that is named but cannot carry an adapter is an error; "all-linear" leaves it out and
    says so in ``skipped``.

    Raises:
        TargetError: No module is meant, or one that is meant cannot carry an adapter.
    """
    if variant_for(model) is not None:
        raise TargetError(
            f"the model itself is a {type(model).__name__} layer, and adapters are named by their "
            "path below it.",
            hint="Put it into an nn.Sequential, or use gauge_ext.adapters.adapt.",
        )
    named = [(n, m) for n, m in base_modules(model).items() if n and config.selects(n)]
    whole = saved_modules(model, config)
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    experts: dict[str, str] = {}
    if config.is_all_linear:
        heads = _output_layers(model, config)
        for name, module in named:
            variant = variant_for(module)
            if not (variant.is_linear if variant else isinstance(module, nn.Linear)):
                continue
            if (
                reason := _trained_whole(name, whole)
                or heads.get(module)
                or blocker(model, name, module)
            ):
                skipped[name] = reason
            else:
                layers |= _with_companions(name, module)
        experts = _bare_experts(model, config, whole)
        skipped |= experts
    else:
        for name, module in named:
            if reason := _trained_whole(name, whole):
                skipped[name] = reason
                continue
            follows = config.ensure_weight_tying and isinstance(module, TiedLinear)
            if not follows and (reason := blocker(model, name, module)):
                raise TargetError(
                    f"target_modules {_shown(config)} names {name!r}, which cannot carry an "
                    f"adapter: {reason}.",
                    hint=_children_hint(name, module),
                )
            layers |= _with_companions(name, module)
    unmatched = _unmatched(model, config)
    parameters = target_parameters(model, config)
    for path, holder in parameters.items():
        if holder in layers.values():
            raise TargetError(
                f"target_parameters name {path!r}, and target_modules {_shown(config)} the module "
                "that holds it; one adapter is all it can carry.",
                hint="Leave it out of target_modules.",
            )
    if not layers and not parameters:
        raise TargetError(
            f"target_modules {_shown(config)} matches no module of {type(model).__name__} that "
            f"can carry an adapter{_why_none(config, skipped)}.",
            hint=nearest_hint(model, unmatched),
        )
    tied = tie_targets(model, config, layers, whole) if config.ensure_weight_tying else {}
    if tied:
        layers = _with_tables(model, layers, tied)
    return TargetMatch(layers, skipped, unmatched, parameters, tuple(experts), tied)


def _with_tables(
    model: nn.Module, layers: Mapping[str, nn.Module], tied: Mapping[str, str]
) -> dict[str, nn.Module]:
    """The embeddings in the place of what is tied to them, in the model's order."""
    modules, tables = base_modules(model), set(tied.values())
    for path in tables:
        if reason := blocker(model, path, modules[path]):
            raise TargetError(
                f"ensure_weight_tying is on, and {path!r} cannot carry the adapter: {reason}."
            )
    meant = {*layers, *tables} - tied.keys()
    return {path: module for path, module in modules.items() if path in meant}


def target_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Find the parameters that ``target_parameters`` mean: path -> the module that holds it.

    Raises:
        TargetError: A name means no parameter, or one that cannot carry an adapter.
    """
    found = {
        f"{path}.{name}": module
        for path, module in base_modules(model).items()
        for name, _ in module.named_parameters(recurse=False)
        if path and config.selects_parameter(f"{path}.{name}")
    }
    for entry in config.target_parameters or ():
        if not any(patterns.name_selects(entry, path) for path in found):
            stacks = [path for path, p in model.named_parameters() if p.dim() == 3]
            raise TargetError(
                f"target_parameters names {entry!r}, and no module of {type(model).__name__} holds "
                "a parameter that is called so.",
                hint=f"Parameters with three sides are: {', '.join(stacks[:6]) or 'none'}.",
            )
    for path, module in found.items():
        if reason := reason_against_parameter(module, path.rpartition(".")[2]):
            raise TargetError(
                f"target_parameters names {path!r}, which cannot carry an adapter: {reason}."
            )
    return found


def _bare_experts(model: nn.Module, config: LoRAConfig, whole: Iterable[str]) -> dict[str, str]:
    """Find the matrices of experts and routers that are parameters of no layer: path -> why.

    Transformers 5 keeps experts so that were linear layers before, and PEFT takes those of the
    model types in a table of its for "all-linear" still, with twice the rank where two were fused.
    Here no type of model is special, and what is no linear layer is named.
    """
    found = {}
    for path, module in base_modules(model).items():
        kind = type(module).__name__
        if not (path and config.selects(path) and any(part in kind for part in _EXPERTS)):
            continue
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}"
            if parameter is None or parameter.dim() not in (2, 3) or "bias" in name:
                continue
            if not (config.selects_parameter(full) or _trained_whole(full, whole)):
                found[full] = f"it is a bare parameter of {kind}; target_parameters can name it"
    return found


def _with_companions(name: str, module: nn.Module) -> dict[str, nn.Module]:
    variant = variant_for(module)
    inside = variant.companions if variant is not None else ()
    return {name: module} | {f"{name}.{path}": module.get_submodule(path) for path in inside}


def _trained_whole(name: str, modules: Iterable[str]) -> str | None:
    inside = any(name == module or name.startswith(f"{module}.") for module in modules)
    return "modules_to_save has it trained whole" if inside else None


def blocker(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Say why the module at ``name`` in ``model`` cannot carry an adapter, or a further one."""
    if isinstance(module, AdaptedLayer):
        return None
    if isinstance(module, TiedLinear):
        others = ", ".join(map(repr, module.source.names))
        return f"in {others} it has the adapter of the embedding it is tied to"
    if isinstance(module, WholeModule):
        return f"{', '.join(map(repr, module.names))} has it trained whole (modules_to_save)"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA_TYPES and name.rpartition(".")[2] == "out_proj":
        return f"the fused kernels of {model_type} read its weight and never call it"
    return unsupported_reason(module)


def nearest_hint(model: nn.Module, wanted: Iterable[str]) -> str:
    """Name the layers that come nearest to ``wanted``, and those that there are."""
    able = [(n, m) for n, m in base_modules(model).items() if n and blocker(model, n, m) is None]
    linear = [n for n, m in able if (variant := variant_for(m)) and variant.is_linear]
    paths = linear or [n for n, _ in able]
    if not paths:
        return "The model has no layer that can carry an adapter."
    tails = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    near = [
        f"{name!r} may be {match!r}"
        for name in wanted
        for match in difflib.get_close_matches(name, [*tails, *paths], n=1)
    ]
    known = ", ".join(tails[:12]) + (", ..." if len(tails) > 12 else "")
    return f"{'; '.join(near)}{'. ' if near else ''}Its layers end in: {known}."


def _output_layers(model: nn.Module, config: LoRAConfig) -> dict[nn.Module, str]:
    reasons: dict[nn.Module, str] = {}
    embeddings = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings[id(module.weight)] = name
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            reasons[head] = "it is the output embedding"
    if not reasons and config.task_type == "SEQ_CLS":
        for attribute in _CLASSIFIER_HEADS:
            if isinstance(head := getattr(model, attribute, None), nn.Module):
                reasons |= dict.fromkeys(head.modules(), "it is the classifier's head")
                break
    for module in model.modules():
        if isinstance(module, nn.Linear) and (tied := embeddings.get(id(module.weight))):
            reasons.setdefault(module, f"it shares its weight with the embedding {tied!r}")
    return reasons


def _unmatched(model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
    if isinstance(config.target_modules, str):
        return ()
    names = list(base_modules(model))
    return tuple(
        entry
        for entry in config.target_modules
        if not any(patterns.name_selects(entry, name) for name in names)
    )


def _shown(config: LoRAConfig) -> str:
    targets = config.target_modules
    return repr(targets) if isinstance(targets, str) else repr(list(targets))


def _why_none(config: LoRAConfig, skipped: dict[str, str]) -> str:
    limits = [
        f"{name}={value!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, name)) is not None
    ]
    left_out = [f"{name!r} was skipped: {reason}" for name, reason in list(skipped.items())[:3]]
    notes = ([f"with {', '.join(limits)}"] if limits else []) + left_out
    return f" ({'; '.join(notes)})" if notes else ""


def _children_hint(name: str, module: nn.Module) -> str:
    inside = [
        child for child, m in module.named_modules() if child and unsupported_reason(m) is None
    ]
    if inside:
        return f"Name the layers inside it: {', '.join(inside[:6])}."
    return f"Leave it out with exclude_modules=[{name!r}], or name the wanted modules more exactly."
