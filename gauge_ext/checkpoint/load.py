"""From an adapter's folder onto a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from gauge_ext.adapters import AdaptedLayer, variant_for
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.checkpoint.placing import placed
from gauge_ext.checkpoint.read import AdapterCheckpoint, read_adapter
from gauge_ext.checkpoint.tied import apart
from gauge_ext.checkpoint.whole import fill_whole, require_whole
from gauge_ext.errors import AdapterMismatchError, AdapterStateError, TargetError
from gauge_ext.models.adapted import attachment, base_modules, lora_layers, record, unwrap
from gauge_ext.models.attach import detach, put_on
from gauge_ext.models.many import delete_adapter
from gauge_ext.models.roster import (
    adapter_names,
    require_new_name,
    require_unmerged,
    sole_name,
)
from gauge_ext.models.targets import blocker, nearest_hint

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_adapter(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = True,
    allow_pickle: bool = False,
) -> ModelT:
    """Put the adapter in a folder onto ``model``, in place; on a failure nothing is changed.

    The model gets adapters on exactly the layers that the file names; a bare one's other parameters
    are frozen. An adapter of that name that is there already, of the same shapes, gets the file's
    values, scaling and config. A further adapter is not active, see
    :func:`gauge_ext.set_adapters`.

    Args:
        model: The base that the adapter was made for, bare or with adapters.
        path: The adapter's folder in PEFT's format.
        name: What it is to be called; None: as the only adapter that is there, or ``default``.
        trainable: Whether the adapters require gradients.
        allow_pickle: See :func:`~gauge_ext.checkpoint.read_adapter`.

    Returns:
        ``model``. Of a base on the meta device the adapter has its values, on the CPU, and the base
        takes its own by ``load_state_dict(..., assign=True, strict=False)``.

    Raises:
        AdapterFormatError: See :func:`~gauge_ext.checkpoint.read_adapter`, as for ConfigError and
            NonFiniteError.
        AdapterMismatchError: The adapter is for another model: unknown modules, other shapes,
            another rank, or layers for which it has no weights.
        TargetError: A layer that it names cannot carry an adapter.
        AdapterStateError: The model's adapters are merged, or it has several and no name is given;
            or the file holds parameters of a base that is on the meta device.
        ConfigError: The name cannot be used, or a further adapter holds trained biases.
    """
    checkpoint = read_adapter(path, allow_pickle=allow_pickle)
    inner = unwrap(model)
    checkpoint, parameters = placed(checkpoint, inner)
    checkpoint, tied = apart(checkpoint, inner)
    others = adapter_names(inner)
    if name is None:
        name = sole_name(inner, "exchanged") if others else DEFAULT
    present = _low_rank(inner, name) if name in others else {}
    if present:
        _require_same(inner, checkpoint, present, name)
        require_whole(checkpoint, inner, name)
        done = attachment(inner)
        config = dataclasses.replace(
            checkpoint.config, adapter_dtype=done.configs[name].adapter_dtype
        )
        record(inner, dataclasses.replace(done, configs={**done.configs, name: config}))
    else:
        require_new_name(inner, name)
        require_unmerged(inner)
        layers = _layers_for(inner, checkpoint, tied)
        put_on(inner, checkpoint.config, layers, {}, parameters, name, tied)
    try:
        if parameters and not present:
            _require_shapes(checkpoint, _low_rank(inner, name))
        _fill(checkpoint, _low_rank(inner, name), name, trainable=trainable)
        fill_whole(checkpoint, inner, name, trainable=trainable)
    except BaseException:
        if not present and others:
            delete_adapter(inner, name)
        elif not present:
            detach(inner)
        raise
    return model


def _low_rank(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """The layers that have a low-rank adapter of that name."""
    return {
        path: layer
        for path, layer in lora_layers(model).items()
        if layer.kind != "tokens" and name in layer.names
    }


@torch.no_grad()
def _fill(
    checkpoint: AdapterCheckpoint,
    layers: Mapping[str, AdaptedLayer],
    name: str,
    *,
    trainable: bool,
) -> None:
    for path, pair in checkpoint.tensors.items():
        slot = layers[path].adapter(name)
        parameters = slot.trained()
        if parameters.keys() != pair.tensors.keys():
            raise AdapterMismatchError(
                f"the adapter at {path!r} consists of {', '.join(parameters)}, and that in "
                f"{checkpoint.path} of {', '.join(pair.tensors)}.",
                hint="use_dora and lora_bias of the config say what there has to be.",
            )
        for factor, tensor in pair.tensors.items():
            if (here := parameters[factor]).is_meta:
                # A base that has its weights yet to come; the adapter has its own from now on.
                here = nn.Parameter(tensor.to(here.dtype, copy=True))
                setattr(slot, factor, here)
            else:
                here.copy_(tensor)
            here.requires_grad_(trainable)
        named = checkpoint.config.name_for(path, pair.kind)
        slot.scaling = checkpoint.config.scaling_for(named)
        slot.dropout_p = checkpoint.config.dropout


def _layers_for(
    model: nn.Module, checkpoint: AdapterCheckpoint, tied: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Return the layers of a bare model that the file names, if it fits them."""
    modules = base_modules(model)
    names = [name for name, pair in checkpoint.tensors.items() if pair.kind != "parameter"]
    if unknown := [name for name in names if name not in modules]:
        raise _other_model(model, checkpoint, unknown)
    layers: dict[str, nn.Module] = {}
    for name in names:
        module = modules[name]
        inside = checkpoint.tensors[name].kind == "out_proj"
        if inside and checkpoint.config.name_for(name, "out_proj") not in checkpoint.tensors:
            raise AdapterMismatchError(
                f"{checkpoint.path} has an adapter for {name!r} and none for the attention that "
                "it is a part of."
            )
        if not inside and (reason := blocker(model, name, module)):
            raise TargetError(
                f"{checkpoint.path} has an adapter for {name!r}, which cannot carry one: {reason}."
            )
        layers[name] = module
    _require_shapes(checkpoint, layers)
    missing = [
        name
        for name, module in modules.items()
        if name
        and name not in layers
        and name not in tied
        and checkpoint.config.selects(name)
        and blocker(model, name, module) is None
    ]
    # What "all-linear" leaves out differs between libraries, so there the file has the last word.
    if missing and not checkpoint.config.is_all_linear:
        raise AdapterMismatchError(
            f"target_modules of {checkpoint.path} mean {len(missing)} more layers of this "
            f"{type(model).__name__} than the file has weights for: {_some(missing)}.",
            hint="It was made for a model with fewer layers, or is not complete."
            + _base_note(checkpoint),
        )
    return layers


def _require_shapes(checkpoint: AdapterCheckpoint, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        pair = checkpoint.tensors[name]
        variant = type(layer) if isinstance(layer, AdaptedLayer) else variant_for(layer)
        if variant is None:
            continue  # blocker() has refused it
        theirs = {factor: tuple(tensor.shape) for factor, tensor in pair.tensors.items()}
        theirs = {name: theirs[name] for name in ("lora_A", "lora_B")}
        # That of stacked matrices is not in the shapes alone.
        named = checkpoint.config.name_for(name, pair.kind)
        rank = checkpoint.config.rank_for(named) if pair.kind == "parameter" else pair.rank
        ours = dict(zip(theirs, variant.factor_shapes(layer, rank), strict=True))
        if pair.kind != variant.kind or theirs != ours:
            holder = layer.owner if isinstance(layer, AdaptedLayer) else layer
            adapted = layer if isinstance(layer, AdaptedLayer) else variant
            weight = tuple(getattr(holder, adapted.weight_name).shape)
            raise AdapterMismatchError(
                f"the adapter for {name!r} does not fit: it has {_shapes(theirs)}, and the model's "
                f"weight of shape {weight} needs {_shapes(ours)}.",
                hint=f"It was made for a model of another size.{_base_note(checkpoint)}",
            )


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in shapes.items())


def _require_same(
    model: nn.Module,
    checkpoint: AdapterCheckpoint,
    layers: Mapping[str, AdaptedLayer],
    called: str,
) -> None:
    """Check that the adapters on the model have the names, shapes and ranks of the file's."""
    attachment(model)  # says what is wrong where only a part of the model has adapters
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise AdapterStateError(
            f"the model's adapters are merged, the first of them {merged[0]!r}.",
            hint="Call gauge_ext.unmerge() before loading others.",
        )
    lacking = [name for name in layers if name not in checkpoint.tensors]
    surplus = [name for name in checkpoint.tensors if name not in layers]
    if lacking or surplus:
        parts = [f"it has none for {_some(lacking)}"] if lacking else []
        parts += [f"the model has none at {_some(surplus)}"] if surplus else []
        raise AdapterMismatchError(
            f"the adapters on the model are not those of {checkpoint.path}: {'; '.join(parts)}.",
            hint="Call gauge_ext.detach() first, and load onto the bare model.",
        )
    _require_shapes(checkpoint, layers)
    for name, layer in layers.items():
        pair, slot = checkpoint.tensors[name], layer.adapter(called)
        if pair.lora_A.shape != slot.lora_A.shape:
            raise AdapterMismatchError(
                f"the adapter at {name!r} has rank {layer.rank_of(slot)}, lora_A "
                f"{tuple(slot.lora_A.shape)}, and that in {checkpoint.path} has rank "
                f"{pair.lora_A.shape[0]}, lora_A {tuple(pair.lora_A.shape)}.",
                hint="Load it under a name of its own, or call gauge_ext.detach() first.",
            )


def _other_model(
    model: nn.Module, checkpoint: AdapterCheckpoint, unknown: list[str]
) -> AdapterMismatchError:
    names = list(checkpoint.tensors)
    modules = base_modules(model)
    hint = nearest_hint(model, dict.fromkeys(name.rpartition(".")[2] for name in unknown))
    for module in modules:
        holder = module.removesuffix(f".{names[0]}")
        if holder != module and all(f"{holder}.{name}" in modules for name in names):
            hint = f"They all fit the submodule {holder!r}: pass that to load_adapter."
    holder = names[0].partition(".")[0]
    if all(n.startswith(f"{holder}.") and n.partition(".")[2] in modules for n in names):
        hint = (
            f"They would all fit without {holder!r} in front: the adapter was made for a model "
            "that holds this one under that name; load the base as that class."
        )
    return AdapterMismatchError(
        f"{checkpoint.path} is for another model: {len(unknown)} of its {len(names)} modules are "
        f"not in this {type(model).__name__}: {_some(unknown)}.",
        hint=hint + _base_note(checkpoint),
    )


def _base_note(checkpoint: AdapterCheckpoint) -> str:
    """Say what the adapter's config knows of its base."""
    mapping = checkpoint.raw_config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    notes = [str(note) for note in (checkpoint.config.base_model_name_or_path, kind) if note]
    return f" Its config names the base {', a '.join(notes)}." if notes else ""


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
