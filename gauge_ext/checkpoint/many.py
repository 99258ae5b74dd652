"""Several named adapters to and from disk, laid out as PEFT does, and one exchanged in place.

The adapter ``default`` lies in the root of the folder, any other in a subfolder of its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRALinear
from gauge_ext.adapters.many import ManyLoRALinear
from gauge_ext.checkpoint.format import CONFIG_NAME, LoRAPair
from gauge_ext.checkpoint.load import load_adapter
from gauge_ext.checkpoint.read import AdapterCheckpoint, read_adapter
from gauge_ext.checkpoint.write import describe, write_adapter
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, AdapterStateError
from gauge_ext.models.attach import lora_layers, unwrap
from gauge_ext.models.many import (
    adapter_factors,
    add_adapter,
    delete_adapter,
    named_config,
    rename_adapter,
)
from gauge_ext.models.roster import DEFAULT, adapter_names

ModelT = TypeVar("ModelT", bound=nn.Module)


def save_adapters(
    model: nn.Module, path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> dict[str, Path]:
    """Write adapters of ``model`` in PEFT's format: ``default`` to ``path``, others below it.

    Args:
        model: A model with named adapters.
        path: The folder; it is made if need be.
        names: Which of them; None: all.

    Returns:
        The folder of each adapter.

    Raises:
        AdapterStateError: There is no such adapter.
        NonFiniteError: A factor holds NaN or infinity.
        WriteError: The system refused a write.
    """
    inner = unwrap(model)
    wanted = list(adapter_names(inner) if names is None else names)
    written = {}
    for name in sorted(wanted, key=lambda name: name != DEFAULT):  # the root first
        holders = adapter_factors(inner, name)
        pairs = {
            module: LoRAPair(cast("Tensor", holder.lora_A), cast("Tensor", holder.lora_B))
            for module, holder in holders.items()
        }
        folder = Path(path) if name == DEFAULT else Path(path) / name
        written[name] = write_adapter(
            describe(inner, named_config(inner, name), pairs), pairs, folder
        )
    return written


def load_adapters(
    model: ModelT,
    folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    trainable: bool = True,
) -> ModelT:
    """Put adapters from disk onto ``model`` under names, beside those that are there.

    Args:
        model: A bare model, or one with adapters on ``nn.Linear`` layers.
        folders: A folder that :func:`save_adapters` or PEFT wrote, with ``default`` in its root and
            others below; or name -> folder. The first adapter of a bare model is active.
        trainable: Whether they require gradients.

    Returns:
        ``model``. Where one of them does not fit, those before it stay.

    Raises:
        AdapterFormatError: There is no adapter, as for what
            :func:`~gauge_ext.checkpoint.read_adapter` refuses.
        AdapterMismatchError: An adapter is for another model.
        AdapterStateError: There is an adapter of that name, or the adapters are merged.
    """
    inner = unwrap(model)
    for name, folder in _folders(folders).items():
        if not lora_layers(inner):
            load_adapter(inner, folder, trainable=trainable)
            if name != DEFAULT:
                rename_adapter(inner, DEFAULT, name)
            continue
        checkpoint = read_adapter(folder)
        _require_modules(inner, checkpoint)
        add_adapter(inner, checkpoint.config, name)
        try:
            _fill(checkpoint, adapter_factors(inner, name), trainable=trainable)
        except BaseException:
            delete_adapter(inner, name)
            raise
    return model


@torch.no_grad()
def swap_adapter(model: ModelT, path: str | os.PathLike[str], name: str = DEFAULT) -> ModelT:
    """Write another adapter's values into the parameters of one that is there.

    The parameters stay the same objects, at the same addresses, and no number that
    ``torch.compile`` has looked at changes: nothing is allocated on the model and nothing compiled
    again. An adapter of a lower rank is filled up with zeros, through which no gradient flows: such
    an adapter is for use, not for training. The scaling stays as it is, and ``lora_B`` makes up for
    the difference to the file's.

    Args:
        model: A model with adapters on the same ``nn.Linear`` layers.
        path: The folder of the other adapter.
        name: Which adapter gets its values.

    Returns:
        ``model``.

    Raises:
        AdapterMismatchError: It is for other layers, or of a higher rank; nothing is changed.
        AdapterStateError: There is no adapter of that name, or the adapters are merged.
    """
    inner = unwrap(model)
    checkpoint = read_adapter(path)
    holders = _holders(inner, name)
    if set(holders) != set(checkpoint.tensors):
        other = sorted(set(holders) ^ set(checkpoint.tensors))
        raise AdapterMismatchError(
            f"{path} and the adapter {name!r} on the model are for other layers; only one of them "
            f"has {other[0]!r}.",
            hint="Load it under a name of its own with load_adapters().",
        )
    for module, holder in holders.items():
        a, b = (cast("Tensor", getattr(holder, factor)) for factor in ("lora_A", "lora_B"))
        pair = checkpoint.tensors[module]
        fits = pair.lora_A.shape[1:] == a.shape[1:] and pair.lora_B.shape[0] == b.shape[0]
        if not fits or pair.rank > len(a):
            raise AdapterMismatchError(
                f"the adapter {name!r} at {module!r} has lora_A {tuple(a.shape)} and lora_B "
                f"{tuple(b.shape)}; {path} has {tuple(pair.lora_A.shape)} and "
                f"{tuple(pair.lora_B.shape)}.",
                hint="It may have a lower rank, not a higher one: attach with the highest.",
            )
    for module, holder in holders.items():
        pair, scaling = checkpoint.tensors[module], cast("float", holder.scaling)
        a, b = (cast("Tensor", getattr(holder, factor)) for factor in ("lora_A", "lora_B"))
        a.zero_()[: pair.rank].copy_(pair.lora_A)
        b.zero_()[:, : pair.rank].copy_(
            pair.lora_B.double() * (checkpoint.config.scaling_for(module) / scaling)
        )
    return model


def _folders(
    folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
) -> dict[str, Path]:
    if isinstance(folders, Mapping):
        return {name: Path(folder) for name, folder in folders.items()}
    root = Path(folders)
    found = {DEFAULT: root} if (root / CONFIG_NAME).is_file() else {}
    if root.is_dir():
        below = sorted(file.parent for file in root.glob(f"*/{CONFIG_NAME}"))
        found |= {folder.name: folder for folder in below}
    if not found:
        raise AdapterFormatError(
            f"there is no adapter in {root}: neither it nor a folder in it has {CONFIG_NAME}."
        )
    return found


def _holders(model: nn.Module, name: str) -> dict[str, nn.Module]:
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise AdapterStateError(
            "the model's adapters are merged.", hint="Call gauge_ext.unmerge() first."
        )
    named_config(model, name)  # says so where there is none
    if any(isinstance(layer, ManyLoRALinear) for layer in layers.values()):
        return adapter_factors(model, name)
    # One that was only attached stays what it is, class and all.
    if strange := [path for path, layer in layers.items() if not isinstance(layer, LoRALinear)]:
        raise AdapterMismatchError(
            f"{strange[0]} is not a linear layer, and only those can be swapped.",
            hint="Use load_adapter(), which takes any layer.",
        )
    return dict(layers)


def _require_modules(model: nn.Module, checkpoint: AdapterCheckpoint) -> None:
    modules = dict(model.named_modules())
    if unknown := [name for name in checkpoint.tensors if name not in modules]:
        raise AdapterMismatchError(
            f"{checkpoint.path} is for another model: {len(unknown)} of its "
            f"{len(checkpoint.tensors)} modules are not in this {type(model).__name__}, the first "
            f"of them {unknown[0]!r}."
        )


@torch.no_grad()
def _fill(
    checkpoint: AdapterCheckpoint, holders: Mapping[str, nn.Module], *, trainable: bool
) -> None:
    if set(holders) != set(checkpoint.tensors):
        other = sorted(set(holders) ^ set(checkpoint.tensors))
        raise AdapterMismatchError(
            f"{checkpoint.path} and its target_modules mean other layers of this model; only one "
            f"of them has {other[0]!r}.",
            hint="It was made for a model with other layers, or is not complete.",
        )
    for module, holder in holders.items():
        for factor, tensor in checkpoint.tensors[module].tensors.items():
            parameter = holder.get_parameter(factor)
            if parameter.shape != tensor.shape:
                raise AdapterMismatchError(
                    f"the adapter for {module!r} does not fit: it has {factor} "
                    f"{tuple(tensor.shape)}, and the model needs {tuple(parameter.shape)}.",
                    hint="It was made for a model of another size.",
                )
            parameter.copy_(tensor)
            parameter.requires_grad_(trainable)
