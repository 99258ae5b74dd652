"""When two adapters are the same: a hash of what they compute."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.hashing import HashedFactor, hash_factors
from gauge_ext.models import adapter_config, adapters, attached_modules, whole_parameters


def adapter_digest(
    config: LoRAConfig, tensors: Mapping[str, LoRAPair], whole: Mapping[str, Tensor] | None = None
) -> str:
    """Return the SHA-256 of an adapter's mathematics, in hexadecimal.

    It covers, for every module in the order of their paths: the path, the scaling, and the shapes
    and values of its tensors; then the parameters that were trained whole. Values are hashed as
    float64, which holds those of every narrower dtype exactly, so that an adapter is the same
    whether it is stored in bfloat16 or widened to float32 for training. Notes in the config (task,
    base, dropout) are not part of it.
    """
    scalings = {
        name: config.scaling_for(config.name_for(name, pair.kind)) for name, pair in tensors.items()
    }
    return _digest(scalings, tensors, whole or {})


def adapter_sha256(model: nn.Module) -> str:
    """Return the digest of the adapters on ``model``: that of the folder they are saved to.

    Adapters that were put on one submodule, such as the encoder within a pipeline, are saved from
    there, and count with their paths from there.

    Raises:
        AdapterStateError: No adapters are attached.
    """
    owners = attached_modules(model)
    owner = owners[0] if len(owners) == 1 else model
    layers = adapters(owner)
    if not layers:
        adapter_config(model)  # says what is wrong where nothing is attached
    return _digest(
        {name: layer.scaling for name, layer in layers.items()},
        {name: LoRAPair.of(layer) for name, layer in layers.items()},
        whole_parameters(owner),
    )


def _digest(
    scalings: Mapping[str, float], tensors: Mapping[str, LoRAPair], whole: Mapping[str, Tensor]
) -> str:
    modules = [
        (name, scalings[name], map(_hashed, tensors[name].tensors.values()))
        for name in sorted(tensors)
    ]
    # The table of an adapted embedding, which PEFT saves along, is the base's own.
    trained = sorted(name for name in whole if name.removesuffix(".weight") not in tensors)
    return hash_factors(
        itertools.chain(modules, ((name, 1.0, [_hashed(whole[name])]) for name in trained))
    )


def _hashed(factor: Tensor) -> HashedFactor:
    wide = factor.detach().to("cpu", torch.float64).contiguous()
    # By address, since numpy, which torch needs for its own way, may be absent. The tensor comes
    # along so that its memory outlives the address.
    buffer = (ctypes.c_char * wide.nbytes).from_address(wide.data_ptr())
    buffer.owner = wide  # type: ignore[attr-defined]
    return HashedFactor(tuple(factor.shape), buffer)
