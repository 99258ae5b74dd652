"""A file's adapters on bare parameters at their places in a model."""

from __future__ import annotations

import dataclasses

from torch import nn

from gauge_ext.adapters.parameter import CHILD
from gauge_ext.checkpoint.format import unwrapped
from gauge_ext.checkpoint.nesting import nested
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.errors import AdapterMismatchError
from gauge_ext.models.targets import target_parameters


def placed(
    checkpoint: AdapterCheckpoint, model: nn.Module
) -> tuple[AdapterCheckpoint, dict[str, nn.Module]]:
    """Give a file's adapters on parameters the paths that they have in ``model``.

    Returns:
        The checkpoint, and the parameters that it adapts: path -> the module that holds it.

    Raises:
        TargetError: The config names a parameter that the model lacks or that cannot carry one.
        AdapterMismatchError: The file has adapters for more or fewer parameters of a module than
            its config means there.
    """
    there = {name for name, pair in checkpoint.tensors.items() if pair.kind == "parameter"}
    if not there:
        return checkpoint, {}
    parameters = target_parameters(model, checkpoint.config)
    held: dict[str, list[str]] = {}
    for path in parameters:
        holder, _, name = path.rpartition(".")
        held.setdefault(holder, []).append(f"{holder}.{CHILD}{name}")
    names = {path: name for holder in held for path, name in nested(holder, held[holder]).items()}
    if there != set(names.values()):
        odd = sorted(there ^ set(names.values()))
        raise AdapterMismatchError(
            f"target_parameters of {checkpoint.path} mean {len(names)} parameters of this "
            f"{type(model).__name__}, and the file has adapters for {len(there)}; they differ at "
            f"{unwrapped(odd[0])!r}.",
            hint="It was made for another model, or is not complete.",
        )
    others = {name: pair for name, pair in checkpoint.tensors.items() if name not in there}
    moved = {path: checkpoint.tensors[name] for path, name in names.items()}
    return dataclasses.replace(checkpoint, tensors=others | moved), parameters
