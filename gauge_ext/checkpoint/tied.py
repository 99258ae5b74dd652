"""An embedding's adapter in a file, and its copies for the output layers that are tied to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.format import LoRAPair, turned
from gauge_ext.checkpoint.read import AdapterCheckpoint
from gauge_ext.errors import AdapterMismatchError
from gauge_ext.models.tied import sharers


def is_turned(pair: LoRAPair, table: LoRAPair) -> bool:
    """Say whether ``pair`` is what :func:`turned` makes of an embedding's, bit for bit."""
    if table.kind != "embedding" or pair.kind != "linear" or {*pair.tensors} != {*table.tensors}:
        return False
    expected = turned(table)
    return torch.equal(pair.lora_A, expected.lora_A) and torch.equal(pair.lora_B, expected.lora_B)


def tied_pairs(config: LoRAConfig, tensors: Mapping[str, LoRAPair]) -> dict[str, str]:
    """Return path of each output layer in a file -> the embedding whose adapter it has."""
    if not config.ensure_weight_tying:
        return {}
    tables = [name for name, pair in tensors.items() if pair.kind == "embedding"]
    return {
        name: table
        for name, pair in tensors.items()
        for table in tables
        if is_turned(pair, tensors[table])
    }


def apart(
    checkpoint: AdapterCheckpoint, model: nn.Module
) -> tuple[AdapterCheckpoint, dict[str, str]]:
    """Take out of a file what the layers tied to an embedding repeat of its adapter.

    Returns:
        The checkpoint without it, and path of each such layer of ``model`` -> its embedding; none
        where the config does not say ``ensure_weight_tying``, or the model does not tie them.

    Raises:
        AdapterMismatchError: A layer that is tied to an adapted embedding has another adapter.
    """
    tensors = dict(checkpoint.tensors)
    tied: dict[str, str] = {}
    for group in sharers(model) if checkpoint.config.ensure_weight_tying else ():
        kinds = {path: tensors[path].kind for path in group if path in tensors}
        table = next((path for path, kind in kinds.items() if kind == "embedding"), None)
        if table is None:
            continue
        for path in group:
            if path == table:
                continue
            pair = tensors.pop(path, None)
            if pair is not None and not is_turned(pair, tensors[table]):
                raise AdapterMismatchError(
                    f"ensure_weight_tying of {checkpoint.path} is on, and its adapter for {path!r} "
                    f"is not that of {table!r}, which has the same weight.",
                    hint="Set it to false in adapter_config.json, to have them as two adapters.",
                )
            tied[path] = table
    return dataclasses.replace(checkpoint, tensors=tensors), tied
