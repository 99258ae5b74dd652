"""What adapters are on a model, and what was done to put them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from gauge_ext.adapters import AdaptedLayer, Adapter, LoRAConfig, LowRankAdapter
from gauge_ext.adapters.many import NamedAdapters, Slots
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.whole import WholeModule, whole_modules
from gauge_ext.errors import AdapterStateError
from gauge_ext.models.fast_path import Switch

KEY = "_gauge_ext_attachment"


@dataclass(frozen=True)
class Attachment:
    """What was done to a model when adapters were put on it; it travels with copies and pickles.

    Attributes:
        configs: The description of each adapter by its name, the oldest first.
        names: Paths of the adapted layers.
        skipped: Layers that "all-linear" left out -> why.
        trainable: Names of the parameters that required gradients before.
        switches: See :func:`gauge_ext.models.fast_path.suspend`.
        whole: Path of each bias that is trained, which the oldest adapter may have asked for -> the
            base's own, which comes back; see :class:`~gauge_ext.adapters.whole.WholeModule` for
            whole modules.
    """

    configs: Mapping[str, LoRAConfig]
    names: tuple[str, ...]
    skipped: Mapping[str, str]
    trainable: frozenset[str]
    switches: tuple[Switch, ...]
    whole: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @property
    def config(self) -> LoRAConfig:
        """The description of the oldest adapter."""
        return next(iter(self.configs.values()))


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


def whole_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained whole beside the adapters, by name.

    Args:
        model: A model, with adapters or without.
        name: Those of one adapter alone, by the names that they have in the base and in a file;
            None: those of all, by their names in the model.
    """
    found: dict[str, nn.Parameter] = {}
    inner = unwrap(model)
    layers = lora_layers(inner)
    for owner_path, owner in inner.named_modules():
        done: Attachment | None = vars(owner).get(KEY)
        if done is None or name not in (None, next(iter(done.configs))):
            continue
        for path in done.whole:
            full = f"{owner_path}.{path}" if owner_path else path
            holder, _, last = full.rpartition(".")
            kept = layers[holder].kept_parameters if holder in layers else {}
            found[full] = kept[last] if last in kept else inner.get_parameter(full)
    tokens = {path: layer for path, layer in layers.items() if layer.kind == "tokens"}
    for path, module in {**whole_modules(inner), **tokens}.items():
        if name is None:
            named = module.adapter_parameters()
        else:
            named = module.adapter(name).trained() if name in module.names else {}
        found |= {f"{path}.{key}" if path else key: value for key, value in named.items()}
    return found


def every_parameter(model: nn.Module) -> list[nn.Parameter]:
    """Return all Parameters, also the base's own in whose place an adapter's stand at present."""
    found = list(model.parameters())
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            found += module.kept_parameters.values()
        elif isinstance(module, WholeModule):
            found += module.own_parameters.values()
    return found


def named_layers(model: nn.Module) -> dict[str, NamedAdapters]:
    """Return all modules that tell adapters by their names, by path: those of lora_layers too."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, NamedAdapters)}


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


def adapter_config(model: nn.Module, name: str | None = None) -> LoRAConfig:
    """Return the config of one adapter on ``model``; without a name, of the oldest.

    Raises:
        AdapterStateError: No adapters were attached, or none of that name.
    """
    configs = attachment(model).configs
    if name is None:
        return next(iter(configs.values()))
    if name not in configs:
        raise AdapterStateError(
            f"there is no adapter {name!r} on the model.",
            hint=f"There are: {', '.join(map(repr, configs))}.",
        )
    return configs[name]


def attachment(model: nn.Module) -> Attachment:
    """Return what :func:`attach` did to ``model``.

    Raises:
        AdapterStateError: No adapters were attached to this very module.
    """
    inner = unwrap(model)
    if (found := vars(inner).get(KEY)) is not None:
        return cast("Attachment", found)
    for path, module in inner.named_modules():
        if KEY in vars(module):
            raise AdapterStateError(
                f"no adapters are attached to this {type(inner).__name__} itself.",
                hint=f"They are on its submodule {path!r}: pass that.",
            )
    raise AdapterStateError(
        f"no adapters are attached to this {type(inner).__name__}.",
        hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
    )


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` by path, without those that adapters brought along."""
    return {
        path: module
        for path, module in unwrap(model).named_modules()
        if not isinstance(module, Slots)
        and type(module) is not AdapterSlot
        and not (isinstance(module, AdaptedLayer) and module.kind in ("parameter", "tokens"))
    }


def attached_modules(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and those of its submodules on which :func:`attach` was called."""
    return [module for module in unwrap(model).modules() if KEY in vars(module)]


def record(model: nn.Module, done: Attachment) -> None:
    """Remember ``done`` on the model."""
    setattr(model, KEY, done)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or ``model`` itself."""
    # By its name: importing torch._dynamo for the class takes a second.
    inner = model
    while type(inner).__name__ == "OptimizedModule":
        inner = cast("nn.Module", inner._orig_mod)
    return inner
