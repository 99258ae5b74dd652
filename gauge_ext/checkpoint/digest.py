"""When two adapters are the same: a hash of what they compute."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.adapters.tokens import TOKENS
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.hashing import HashedFactor, hash_factors
from gauge_ext.checkpoint.nesting import file_names
from gauge_ext.checkpoint.on_model import adapter_parts
from gauge_ext.models import adapter_config, attached_modules, whole_parameters


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
        name: config.scaling_for(
            name if pair.kind == "parameter" else config.name_for(name, pair.kind)
        )
        for name, pair in tensors.items()
    }
    return _digest(config, scalings, tensors, whole or {})


def adapter_sha256(model: nn.Module, name: str | None = None) -> str:
    """Return the digest of an adapter on ``model``: that of the folder it is saved to.

    Adapters that were put on one submodule, such as the encoder within a pipeline, are saved from
    there, and count with their paths from there.

    Args:
        model: A model with adapters.
        name: Which of several; None: the only one, or the only active one.

    Raises:
        AdapterStateError: No adapters are attached, none of that name, or several and it is not
            said which.
    """
    owners = attached_modules(model)
    owner = owners[0] if len(owners) == 1 else model
    name, parts = adapter_parts(owner, name, "hashed")
    names = file_names({path: part.layer for path, part in parts.items()})
    pairs = {names[path]: part.pair for path, part in parts.items()}
    scalings = {names[path]: part.scaling for path, part in parts.items()}
    on_parameters = [path for path, pair in pairs.items() if pair.kind == "parameter"]
    trained = whole_parameters(owner, name)
    config = adapter_config(owner, name) if on_parameters or trained else LoRAConfig()
    for path in on_parameters:
        scalings[path] = config.scaling_for(path)
    return _digest(config, scalings, pairs, trained)


def _digest(
    config: LoRAConfig,
    scalings: Mapping[str, float],
    tensors: Mapping[str, LoRAPair],
    whole: Mapping[str, Tensor],
) -> str:
    modules = [
        (_label(config, name, pair), scalings[name], map(_hashed, pair.tensors.values()))
        for name, pair in sorted(tensors.items())
    ]
    # The table of an adapted embedding, which PEFT saves along, is the base's own.
    trained = sorted(name for name in whole if name.removesuffix(".weight") not in tensors)
    return hash_factors(
        itertools.chain(
            modules, ((_token_label(config, name), 1.0, [_hashed(whole[name])]) for name in trained)
        )
    )


def _token_label(config: LoRAConfig, name: str) -> str:
    """The path; for rows of tokens also which they are."""
    is_rows = name.endswith(f".{TOKENS}.trainable_tokens_delta")
    return f"{name} {config.trainable_token_indices}" if is_rows else name


def _label(config: LoRAConfig, name: str, pair: LoRAPair) -> str:
    """The path; for a bare parameter also all that says which it is, and how it is scaled.

    A file names the module that holds the parameter, so without the model there is no telling
    which of the patterns is meant.
    """
    if pair.kind != "parameter":
        return name
    said = (sorted(config.target_parameters or ()), config.rank_pattern, config.alpha_pattern)
    return f"{name} {said}"


def _hashed(factor: Tensor) -> HashedFactor:
    wide = factor.detach().to("cpu", torch.float64).contiguous()
    # By address, since numpy, which torch needs for its own way, may be absent. The tensor comes
    # along so that its memory outlives the address.
    buffer = (ctypes.c_char * wide.nbytes).from_address(wide.data_ptr())
    buffer.owner = wide  # type: ignore[attr-defined]
    return HashedFactor(tuple(factor.shape), buffer)
