"""Putting adapters on a model's layers, and taking them off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar, cast

from torch import nn

from gauge_ext.adapters import AdaptedLayer, Adapter, LoRAConfig, LowRankAdapter, adapt, variant_for
from gauge_ext.adapters.parameter import adapt_parameter
from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models import fast_path, whole
from gauge_ext.models.row_names import refuse_row_names
from gauge_ext.models.targets import find_targets, nearest_hint
from gauge_ext.models.tokens import train_tokens

ModelT = TypeVar("ModelT", bound=nn.Module)

_KEY = "_gauge_ext_attachment"
# Where models.many keeps the configs of named adapters.
ROSTER = "_gauge_ext_roster"


@dataclass(frozen=True)
class Attachment:
    """What was done to a model when adapters were put on it; it travels with copies and pickles.

    Attributes:
        config: The adapters' description.
        names: Paths of the adapted layers.
        skipped: Layers that "all-linear" left out -> why.
        trainable: Names of the parameters that required gradients before.
        switches: See :func:`gauge_ext.models.fast_path.suspend`.
        whole: Path of each parameter that is trained whole -> the base's own, which comes back.
    """

    config: LoRAConfig
    names: tuple[str, ...]
    skipped: Mapping[str, str]
    trainable: frozenset[str]
    switches: tuple[fast_path.Switch, ...]
    whole: Mapping[str, nn.Parameter] = field(default_factory=dict)


def attach(model: ModelT, config: LoRAConfig) -> ModelT:
    """Put LoRA adapters on the layers that ``config`` means, in place.

    Everything but the adapters is frozen; :func:`detach` restores the former ``requires_grad``.

    Args:
        model: Any module; one compiled by ``torch.compile`` counts as what it wraps.
        config: Which layers, which rank, which scale.

    Returns:
        ``model``. :func:`attachment` tells what was adapted and what was left out.

    Raises:
        TargetError: No layer is meant, or one that is meant cannot carry an adapter.
        AdapterStateError: The model, or a part of it, has adapters already.
        ConfigError: ``config`` is no :class:`LoRAConfig`.
    """
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config must be a LoRAConfig, got a {type(config).__name__}.")
    inner = unwrap(model)
    require_bare(inner)
    match = find_targets(inner, config)
    if match.unmatched:
        warnings.warn(
            f"target_modules {list(match.unmatched)} match no module and were passed over. "
            + nearest_hint(inner, match.unmatched),
            stacklevel=2,
        )
    if experts := match.bare_experts:
        warnings.warn(
            f'"all-linear" leaves out {len(experts)} weights of experts and routers, which are no '
            f"linear layers here, the first of them {experts[0]!r}. To adapt them, name them in "
            f"target_parameters: {sorted({'.'.join(path.split('.')[-2:]) for path in experts})}.",
            stacklevel=2,
        )
    put_on(inner, config, match.layers, match.skipped, match.parameters)
    return model


def put_on(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
    parameters: Mapping[str, nn.Module] = MappingProxyType({}),
) -> None:
    """Adapt exactly ``layers`` and ``parameters`` of a bare ``model``: all, or on failure none."""
    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    adapted: list[AdaptedLayer] = []
    try:
        for name, layer in layers.items():
            variant = variant_for(layer)
            named = config.name_for(name, variant.kind) if variant is not None else name
            adapted.append(adapt(layer, config.spec_for(named)))
        for path, holder in parameters.items():
            spec = config.spec_for(path)
            adapted.append(adapt_parameter(holder, path.rpartition(".")[2], spec))
        taken = (*layers.values(), *parameters.values())
        adapted += train_tokens(model, config, taken, whole.chosen(model, config, layers))
    except BaseException:
        for done in adapted:
            done.to_base()
        raise
    own = {id(p) for layer in adapted for p in layer.adapter_parameters().values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    own_whole = whole.replace(model, whole.chosen(model, config, layers))
    switches = fast_path.suspend(model, layers)
    names = tuple(lora_layers(model)) if len(adapted) > len(layers) else tuple(layers)
    record(model, Attachment(config, names, dict(skipped), trainable, switches, own_whole))


def detach(model: ModelT) -> ModelT:
    """Take the adapters off and leave the model as it was before :func:`attach`, bit for bit.

    Weights, classes of the layers and ``requires_grad`` are as before. Of a model that was merged
    with ``keep_base=False`` the base is gone: what stays is the merged model, in plain layers.

    Raises:
        AdapterStateError: No adapters were attached.
    """
    inner = unwrap(model)
    done = attachment(inner)
    for layer in lora_layers(inner).values():
        if layer.can_unmerge:
            layer.unmerge()
        layer.to_base()
    whole.restore(inner, done.whole)
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(name in done.trainable)
    forget(inner)
    return model


def lora_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the adapted layers by path, in the model's order."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, AdaptedLayer)}


def named_adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of every adapter, lora_A and lora_B, with their names in the model.

    With them come those that are trained whole (``modules_to_save``, ``bias``).
    Those of :class:`~gauge_ext.LoRAGaugeField` and :class:`~gauge_ext.LoRAFiberBundle` have names
    of their own.
    """
    return [
        (f"{name}.{factor}" if name else factor, parameter)
        for name, layer in adapters(model).items()
        for factor, parameter in layer.adapter_parameters().items()
    ] + list(whole_parameters(model).items())


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained whole beside the adapters, by name."""
    found: dict[str, nn.Parameter] = {}
    inner = unwrap(model)
    layers = lora_layers(inner)
    for owner_path, owner in inner.named_modules():
        done: Attachment | None = vars(owner).get(_KEY)
        for path in done.whole if done is not None else ():
            name = f"{owner_path}.{path}" if owner_path else path
            holder, _, last = name.rpartition(".")
            kept = layers[holder].kept_parameters if holder in layers else {}
            found[name] = kept[last] if last in kept else inner.get_parameter(name)
    for path, layer in layers.items():
        if layer.kind == "tokens":
            named = layer.adapter_parameters().items()
            found |= {f"{path}.{name}": parameter for name, parameter in named}
    return found


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return every adapter by the path of its layer, in the model's order.

    Beside :func:`lora_layers` these are the adapters that hold their base as a submodule.
    """
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, AdaptedLayer | LowRankAdapter) and module.kind != "tokens"
    }


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of every adapter: what an optimizer is to train."""
    return [parameter for _, parameter in named_adapter_parameters(model)]


def adapter_config(model: nn.Module) -> LoRAConfig:
    """Return the config of the adapters on ``model``.

    Raises:
        AdapterStateError: No adapters were attached.
    """
    return attachment(model).config


def attachment(model: nn.Module) -> Attachment:
    """Return what :func:`attach` did to ``model``.

    Raises:
        AdapterStateError: No adapters were attached to this very module.
    """
    inner = unwrap(model)
    if (found := vars(inner).get(_KEY)) is not None:
        return cast("Attachment", found)
    for path, module in inner.named_modules():
        if _KEY in vars(module):
            raise AdapterStateError(
                f"no adapters are attached to this {type(inner).__name__} itself.",
                hint=f"They are on its submodule {path!r}: pass that.",
            )
    raise AdapterStateError(
        f"no adapters are attached to this {type(inner).__name__}.",
        hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
    )


def attached_modules(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and those of its submodules on which :func:`attach` was called."""
    return [module for module in unwrap(model).modules() if _KEY in vars(module)]


def record(model: nn.Module, done: Attachment) -> None:
    """Remember ``done`` on the model."""
    setattr(model, _KEY, done)


def forget(model: nn.Module) -> None:
    """Undo :func:`record` on the model and below it, and switch fused paths on again."""
    for module in model.modules():
        vars(module).pop(ROSTER, None)
        refuse_row_names(module)
        if (done := vars(module).pop(_KEY, None)) is not None:
            fast_path.restore(module, done.switches)


def require_bare(model: nn.Module) -> None:
    """Refuse a model that has adapters.

    Raises:
        AdapterStateError: It has.
    """
    if layers := lora_layers(model):
        raise AdapterStateError(
            f"the model has adapters already, on {len(layers)} layers, the first of them "
            f"{next(iter(layers))!r}.",
            hint="Call gauge_ext.detach() first.",
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or ``model`` itself."""
    # By its name: importing torch._dynamo for the class takes a second.
    inner = model
    while type(inner).__name__ == "OptimizedModule":
        inner = cast("nn.Module", inner._orig_mod)
    return inner
