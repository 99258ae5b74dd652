"""Adapters on disk, in the format of PEFT 0.21.

:mod:`format` holds the names of files and keys, :mod:`fields` the policy for every field of PEFT's
config, :mod:`read` and :mod:`load` the way in, :mod:`write` the way out, :mod:`staging` writes a
folder whole or not at all, :mod:`fingerprint` says when two adapters are the same.
"""

from __future__ import annotations

from gauge_ext.checkpoint.fingerprint import adapter_fingerprint, adapter_sha256
from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.checkpoint.load import load_adapter
from gauge_ext.checkpoint.read import AdapterCheckpoint, read_adapter
from gauge_ext.checkpoint.staging import staged_folder
from gauge_ext.checkpoint.write import save_adapter

__all__ = [
    "AdapterCheckpoint",
    "LoRAPair",
    "adapter_fingerprint",
    "adapter_sha256",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "staged_folder",
]
