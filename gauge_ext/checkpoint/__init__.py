"""Adapters on disk, in the format of PEFT 0.21.

:mod:`format` holds the names of files and keys, :mod:`fields` the policy for every field of PEFT's
config, :mod:`read` and :mod:`load` the way in, :mod:`write` the way out, :mod:`assembly` describes
factors that no training made, :mod:`staging` writes a folder whole or not at all,
:mod:`digest` says when two adapters are the same number by number, :mod:`gauges` when they are
the same update, and changes the one without the other. :mod:`extracting` makes an adapter of a full
fine-tune, :mod:`residual` one of what a merge rounds away, :mod:`carry` takes adapters from one
base to another, and :mod:`many` reads and writes several of one model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gauge_ext._lazy import deferred

if TYPE_CHECKING:
    from gauge_ext.checkpoint.assembly import assemble, describe_pairs
    from gauge_ext.checkpoint.carry import lift_adapters, move_adapter, rebase_adapter
    from gauge_ext.checkpoint.digest import adapter_digest, adapter_sha256
    from gauge_ext.checkpoint.extracting import extract
    from gauge_ext.checkpoint.extraction import ExtractedLayer, Extraction
    from gauge_ext.checkpoint.format import LoRAPair
    from gauge_ext.checkpoint.gauges import (
        LayerRegauging,
        adapter_points,
        regauge,
        regauging_report,
    )
    from gauge_ext.checkpoint.load import load_adapter
    from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
    from gauge_ext.checkpoint.moments import InputsError, input_moments
    from gauge_ext.checkpoint.read import AdapterCheckpoint, read_adapter
    from gauge_ext.checkpoint.residual import MergeResidual, merge_with_residual
    from gauge_ext.checkpoint.staging import staged_folder
    from gauge_ext.checkpoint.write import save_adapter, write_adapter
else:
    __getattr__, __dir__ = deferred(__name__)

__all__ = [
    "AdapterCheckpoint",
    "ExtractedLayer",
    "Extraction",
    "InputsError",
    "LayerRegauging",
    "LoRAPair",
    "MergeResidual",
    "adapter_digest",
    "adapter_points",
    "adapter_sha256",
    "assemble",
    "describe_pairs",
    "extract",
    "input_moments",
    "lift_adapters",
    "load_adapter",
    "load_adapters",
    "merge_with_residual",
    "move_adapter",
    "read_adapter",
    "rebase_adapter",
    "regauge",
    "regauging_report",
    "save_adapter",
    "save_adapters",
    "staged_folder",
    "swap_adapter",
    "write_adapter",
]
