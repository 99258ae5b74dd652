"""Reading an adapter's folder, without a model."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.digest import adapter_digest
from gauge_ext.checkpoint.fields import check_supported, from_peft
from gauge_ext.checkpoint.folder import read_config, require_adapter
from gauge_ext.checkpoint.format import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    LoRAPair,
    sort_out,
    with_parameters,
)
from gauge_ext.errors import AdapterFormatError, ConfigError, NonFiniteError


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter as it lies on disk.

    Attributes:
        config: Its description.
        tensors: Path of the module -> its two factors, sorted by path.
        path: The folder.
        raw_config: ``adapter_config.json`` as it is.
        whole: Path of each parameter of the base that was trained whole, or saved along -> value.
        sha256: See :func:`~gauge_ext.checkpoint.adapter_digest`.
    """

    config: LoRAConfig
    tensors: dict[str, LoRAPair]
    path: Path
    raw_config: dict[str, Any]
    sha256: str
    whole: dict[str, Tensor] = field(default_factory=dict)

    def require_plain(self, purpose: str) -> None:
        """Refuse all but two matrices on each linear layer.

        Args:
            purpose: What they are needed for, such as "combined".

        Raises:
            ConfigError: There is more to the adapter; the first such layer is named.
        """
        hint = "Load it onto its model, and merge or export that."
        for name, pair in self.tensors.items():
            if not pair.is_plain:
                what = ", ".join(f"{key} {tuple(t.shape)}" for key, t in pair.tensors.items())
                raise ConfigError(
                    f"an adapter that is to be {purpose} must have two matrices on each linear "
                    f"layer and nothing else; {name!r} has {what} ({pair.kind}).",
                    hint=hint,
                )
        # The table of an adapted embedding, which PEFT saves along, is the base's own.
        trained = [name for name in self.whole if name.removesuffix(".weight") not in self.tensors]
        if trained:
            raise ConfigError(
                f"an adapter that is to be {purpose} must be low-rank throughout; this one holds "
                f"{len(trained)} whole parameters, such as {trained[0]!r}.",
                hint=hint,
            )


def read_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> AdapterCheckpoint:
    """Read a LoRA adapter in PEFT's format and check it.

    Args:
        path: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        allow_pickle: Whether ``adapter_model.bin`` is read where there are no safetensors, by
            torch's reader of weights alone, which runs no code.

    Raises:
        AdapterFormatError: The folder or a file is missing, damaged, or no LoRA adapter.
        ConfigError: The config asks for mathematics that is not implemented; the field is named.
        NonFiniteError: A factor holds NaN or infinity.
    """
    folder = Path(path)
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if allow_pickle and not weights_file.is_file() and (folder / PICKLE_NAME).is_file():
        weights_file = folder / PICKLE_NAME
    require_adapter(folder, weights_file.name)
    raw = read_config(config_file)
    # Before the weights: a refused field explains the keys that sort_out would refuse.
    check_supported(raw, str(config_file))
    says_whole = raw.get("bias") not in (None, "none") or any(
        raw.get(name) for name in ("modules_to_save", "trainable_token_indices")
    )
    tensors, whole = sort_out(_read_weights(weights_file), str(weights_file), whole=says_whole)
    config = from_peft(raw, str(config_file), list(tensors))
    tensors = with_parameters(tensors, config, str(weights_file))
    for name, pair in tensors.items():
        # Which parameter an adapter is on, and so which rank it has, only the model knows.
        if pair.kind != "parameter" and pair.rank != config.rank_for(
            config.name_for(name, pair.kind)
        ):
            raise AdapterFormatError(
                f"{folder}: the rank of {name!r} is {config.rank_for(name)} by {CONFIG_NAME} (r, "
                f"rank_pattern), but its weights have lora_A {tuple(pair.lora_A.shape)} and lora_B "
                f"{tuple(pair.lora_B.shape)}."
            )
        for factor, tensor in pair.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(f"{weights_file}: {factor} of {name!r} holds NaN or infinity.")
    for name, tensor in whole.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{weights_file}: {name!r} holds NaN or infinity.")
    digest = adapter_digest(config, tensors, whole)
    return AdapterCheckpoint(config, tensors, folder, raw, digest, whole)


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise AdapterFormatError(
            f"{file} cannot be read as tensors alone: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise AdapterFormatError(f"{file} must hold tensors by name, got {type(found).__name__}.")
    return found


def _read_weights(file: Path) -> dict[str, Tensor]:
    if file.name == PICKLE_NAME:
        return _read_pickle(file)
    try:
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise AdapterFormatError(f"{file} cannot be read: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise AdapterFormatError(
            f"{file} is damaged or no safetensors file: {error}.",
            hint="Copy or download it again; it may have been cut short.",
        ) from error
