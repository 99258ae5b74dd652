"""What a file holds beside low-rank updates: parameters that were trained whole, or saved along."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from gauge_ext.adapters.whole import WholeModule
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.errors import AdapterMismatchError, AdapterStateError
from gauge_ext.models import whole
from gauge_ext.models.adapted import adapter_config, attachment, record, whole_parameters

_PLAIN = "Load it onto a model of its own, or first of all."


def require_whole(checkpoint: AdapterCheckpoint, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Refuse a file whose whole parameters are not those of the adapter on the model.

    Args:
        checkpoint: What was read.
        model: The module that the adapters are on.
        name: The adapter that is to get the values.

    Returns:
        The values that the file gives to parameters which are the base's own here, where they
        differ: of a base that was changed before training, such as an embedding with new tokens.

    Raises:
        AdapterMismatchError: One is missing in the file or the model, has another size, or is for
            other tokens; or there are others on the base whose values differ.
        AdapterStateError: The model's is on the meta device.
    """
    trained = whole_parameters(model, name)
    if lacking := [path for path in trained if path not in checkpoint.whole]:
        shown = ", ".join(map(repr, lacking[:6])) + (", ..." if len(lacking) > 6 else "")
        raise AdapterMismatchError(
            f"{checkpoint.path} lacks {len(lacking)} parameters that were trained whole "
            f"(modules_to_save, bias) by the adapter {name!r}: {shown}."
        )
    ours = adapter_config(model, name).trainable_token_indices
    theirs = checkpoint.config.trainable_token_indices
    if ours != theirs:
        raise AdapterMismatchError(
            f"the adapter {name!r} trains rows of the tokens {ours} (trainable_token_indices), and "
            f"{checkpoint.path} has rows of {theirs}.",
            hint=_PLAIN,
        )
    there = {**whole.base_parameters(model), **trained}
    changed = {}
    for path, value in checkpoint.whole.items():
        here = there.get(path)
        if here is None or here.shape != value.shape:
            shape = "none of that name" if here is None else f"one of shape {tuple(here.shape)}"
            raise AdapterMismatchError(
                f"{checkpoint.path} holds the parameter {path!r} of shape {tuple(value.shape)}, "
                f"and this {type(model).__name__} has {shape}.",
                hint="If the vocabulary was resized for training, resize the model's first.",
            )
        if here.is_meta:
            raise AdapterStateError(
                f"{checkpoint.path} holds the parameter {path!r} of the base, which is on the meta "
                "device and would take its own values later.",
                hint="Load the base's weights first, and then the adapter.",
            )
        if path not in trained and not torch.equal(here, value.to(here.device, here.dtype)):
            changed[path] = value
    for path in changed:
        holder = model.get_submodule(path.rpartition(".")[0])
        if name != next(iter(attachment(model).configs)) or isinstance(holder, WholeModule):
            raise AdapterMismatchError(
                f"{checkpoint.path} brings values of its own for the base's {path!r}, and the base "
                "is shared with the adapters that are there.",
                hint="Load it first, or onto a copy of the model.",
            )
    return changed


@torch.no_grad()
def fill_whole(
    checkpoint: AdapterCheckpoint, model: nn.Module, name: str, *, trainable: bool
) -> None:
    """Take over the parameters that were trained whole, and those that were saved along.

    Raises:
        AdapterMismatchError: See :func:`require_whole`, as for AdapterStateError; nothing is
            changed.
    """
    changed = require_whole(checkpoint, model, name)
    for path, here in whole_parameters(model, name).items():
        here.copy_(checkpoint.whole[path])
        here.requires_grad_(trainable)
    for path, value in changed.items():
        own = whole.replace(model, [path])
        model.get_parameter(path).copy_(value)
        model.get_parameter(path).requires_grad_(False)
        done = attachment(model)
        record(model, dataclasses.replace(done, whole={**done.whole, **own}))
