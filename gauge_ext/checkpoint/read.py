"""Reading an adapter's folder, without a model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.digest import adapter_digest
from gauge_ext.checkpoint.fields import check_supported, from_peft
from gauge_ext.checkpoint.format import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    LoRAPair,
    pair_up,
)
from gauge_ext.errors import AdapterFormatError, NonFiniteError


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter as it lies on disk.

    Attributes:
        config: Its description.
        tensors: Path of the module -> its two factors, sorted by path.
        path: The folder.
        raw_config: ``adapter_config.json`` as it is.
        sha256: See :func:`~gauge_ext.checkpoint.adapter_digest`.
    """

    config: LoRAConfig
    tensors: dict[str, LoRAPair]
    path: Path
    raw_config: dict[str, Any]
    sha256: str


def read_adapter(path: str | os.PathLike[str]) -> AdapterCheckpoint:
    """Read a LoRA adapter in PEFT's format and check it.

    Args:
        path: The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterFormatError: The folder or a file is missing, damaged, or no LoRA adapter.
        ConfigError: The config asks for mathematics that is not implemented; the field is named.
        NonFiniteError: A factor holds NaN or infinity.
    """
    folder = Path(path)
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    _require_adapter(folder)
    raw = _read_config(config_file)
    # Before the weights: a refused field explains the keys that pair_up would refuse.
    check_supported(raw, str(config_file))
    tensors = pair_up(_read_weights(weights_file), str(weights_file))
    config = from_peft(raw, str(config_file), list(tensors))
    for name, pair in tensors.items():
        if pair.rank != config.rank_for(name):
            raise AdapterFormatError(
                f"{folder}: the rank of {name!r} is {config.rank_for(name)} by {CONFIG_NAME} (r, "
                f"rank_pattern), but its weights have lora_A {tuple(pair.lora_A.shape)} and lora_B "
                f"{tuple(pair.lora_B.shape)}."
            )
        for factor, tensor in pair.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(f"{weights_file}: {factor} of {name!r} holds NaN or infinity.")
    return AdapterCheckpoint(config, tensors, folder, raw, adapter_digest(config, tensors))


def _require_adapter(folder: Path) -> None:
    """Refuse what is not a folder with an adapter's two files, and say what it may be instead."""
    if not folder.exists():
        raise AdapterFormatError(
            f"{folder} does not exist.", hint="Give the folder that holds the adapter."
        )
    if not folder.is_dir():
        raise AdapterFormatError(
            f"{folder} is a file, and an adapter is a folder.",
            hint=f"Give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.",
        )
    if not (folder / CONFIG_NAME).is_file():
        below = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
        raise AdapterFormatError(
            f"{folder} holds no {CONFIG_NAME}, so it is no adapter.",
            hint=f"There are adapters below it: {', '.join(below)}." if below else None,
        )
    if not (folder / WEIGHTS_NAME).is_file():
        pickled = (folder / PICKLE_NAME).is_file()
        raise AdapterFormatError(
            f"{folder} holds no {WEIGHTS_NAME}" + (f", only {PICKLE_NAME}." if pickled else "."),
            hint=(
                f"{PICKLE_NAME} is a pickle, which can run code when it is opened. To turn it into "
                f'a safe file: safetensors.torch.save_file(torch.load("{PICKLE_NAME}", '
                f'weights_only=True), "{WEIGHTS_NAME}").'
            )
            if pickled
            else None,
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFormatError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterFormatError(f"{file} is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{file} must hold a JSON object, got {type(raw).__name__}.")
    return raw


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise AdapterFormatError(f"{file} cannot be read: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise AdapterFormatError(
            f"{file} is damaged or no safetensors file: {error}.",
            hint="Copy or download it again; it may have been cut short.",
        ) from error
