"""Several named adapters to and from disk, laid out as PEFT does, and one exchanged in place.

The adapter ``default`` lies in the root of the folder, any other in a subfolder of its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from gauge_ext.adapters import AdaptedLayer
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.checkpoint.format import CONFIG_NAME, LoRAPair
from gauge_ext.checkpoint.load import load_adapter
from gauge_ext.checkpoint.placing import placed
from gauge_ext.checkpoint.read import read_adapter
from gauge_ext.checkpoint.tied import apart
from gauge_ext.checkpoint.whole import require_whole
from gauge_ext.checkpoint.write import save_adapter
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError
from gauge_ext.models.adapted import lora_layers, unwrap, whole_parameters
from gauge_ext.models.roster import (
    adapter_names,
    require_names,
    require_new_name,
    require_unmerged,
    sole_name,
)

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
    names = adapter_names(model) if names is None else tuple(names)
    require_names(unwrap(model), names)
    written = {}
    for name in sorted(names, key=lambda name: name != DEFAULT):  # the root first
        folder = Path(path) if name == DEFAULT else Path(path) / name
        written[name] = save_adapter(model, folder, name=name)
    return written


def load_adapters(
    model: ModelT,
    folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    trainable: bool = True,
) -> ModelT:
    """Put adapters from disk onto ``model`` under names, beside those that are there.

    Args:
        model: A bare model, or one with adapters.
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
    for name, folder in _folders(folders).items():
        require_new_name(unwrap(model), name)
        load_adapter(model, folder, name=name, trainable=trainable)
    return model


@torch.no_grad()
def swap_adapter(model: ModelT, path: str | os.PathLike[str], name: str | None = None) -> ModelT:
    """Write another adapter's values into the parameters of one that is there.

    The parameters stay the same objects, at the same addresses, and no number that
    ``torch.compile`` has looked at changes: nothing is allocated on the model and nothing compiled
    again. What was trained whole (``modules_to_save``, biases, tokens) gets its values too. An
    adapter of a lower rank is filled up with zeros, through which no gradient flows: such an
    adapter is for use, not for training. The scaling stays as it is, and ``lora_B`` and
    ``lora_bias`` make up for the difference to the file's.

    Args:
        model: A model with adapters on the same layers, of any kind.
        path: The folder of the other adapter.
        name: Which adapter gets its values; None: the only one, or the only active one.

    Returns:
        ``model``.

    Raises:
        AdapterMismatchError: It is for other layers, of a higher rank, consists of other tensors
            (DoRA, ``lora_bias``), or trained other parameters whole; nothing is changed.
        AdapterStateError: There is no adapter of that name, or the adapters are merged.
    """
    inner = unwrap(model)
    name = sole_name(inner, "swapped") if name is None else name
    require_names(inner, [name])
    require_unmerged(inner)
    checkpoint, _ = placed(read_adapter(path), inner)
    checkpoint, _ = apart(checkpoint, inner)
    layers = {
        at: layer
        for at, layer in lora_layers(inner).items()
        if layer.kind != "tokens" and name in layer.names
    }
    if set(layers) != set(checkpoint.tensors):
        other = sorted(set(layers) ^ set(checkpoint.tensors))
        raise AdapterMismatchError(
            f"{path} and the adapter {name!r} on the model are for other layers; only one of them "
            f"has {other[0]!r}.",
            hint="Load it under a name of its own with load_adapter().",
        )
    for module, layer in layers.items():
        _require_room(layer, name, checkpoint.tensors[module], module, path)
    if changed := require_whole(checkpoint, inner, name):
        raise AdapterMismatchError(
            f"{path} brings values of its own for the base's {next(iter(changed))!r}.",
            hint="Load it with load_adapter() onto a model of its own.",
        )
    for at, parameter in whole_parameters(inner, name).items():
        parameter.copy_(checkpoint.whole[at])
    for module, layer in layers.items():
        pair, slot = checkpoint.tensors[module], layer.adapter(name)
        named = checkpoint.config.name_for(module, pair.kind)
        ratio = checkpoint.config.scaling_for(named) / slot.scaling
        layer.fill(slot, pair.lora_A, pair.lora_B.double() * ratio)
        if pair.lora_magnitude is not None:
            slot.lora_magnitude.copy_(pair.lora_magnitude)
        if pair.lora_bias is not None:
            slot.lora_bias.copy_(pair.lora_bias.double() * ratio)
    return model


def _require_room(
    layer: AdaptedLayer, name: str, pair: LoRAPair, module: str, path: str | os.PathLike[str]
) -> None:
    slot = layer.adapter(name)
    if {*pair.tensors} != {*slot.own_names()}:
        raise AdapterMismatchError(
            f"the adapter {name!r} at {module!r} consists of {', '.join(slot.own_names())}; {path} "
            f"has {', '.join(pair.tensors)}.",
            hint="Load it under a name of its own with load_adapter().",
        )
    (own_A, own_B), (a, b) = (slot.lora_A, slot.lora_B), (pair.lora_A, pair.lora_B)
    same = a.shape[1:] == own_A.shape[1:] and (b.shape[0], *b.shape[2:]) == (
        own_B.shape[0],
        *own_B.shape[2:],
    )
    fits = same and a.shape[0] % layer.blocks == 0 and b.shape[1] <= own_B.shape[1]
    if not fits or a.shape[0] > own_A.shape[0]:
        raise AdapterMismatchError(
            f"the adapter {name!r} at {module!r} has lora_A {tuple(own_A.shape)} and lora_B "
            f"{tuple(own_B.shape)}; {path} has {tuple(a.shape)} and {tuple(b.shape)}.",
            hint="It may have a lower rank, not a higher one: attach with the highest.",
        )


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
