"""Adapters on whole models: which modules get one, putting them on and taking them off, merging.

:mod:`targets` finds the modules, :mod:`attach` puts adapters on them and off again, :mod:`merge`
turns adapter and base into one weight and back, :mod:`regauge` changes the factors but not what
they compute, :mod:`fast_path` keeps torch's fused encoder layers from overlooking an adapter.
"""

from __future__ import annotations

from gauge_ext.models.attach import (
    Attachment,
    adapter_config,
    adapter_parameters,
    adapters,
    attach,
    attached_modules,
    attachment,
    detach,
    lora_layers,
    named_adapter_parameters,
    whole_parameters,
)
from gauge_ext.models.merge import is_merged, merge, merged_copy, unmerge
from gauge_ext.models.regauge import regauge_model, regauge_optimizer_state
from gauge_ext.models.targets import TargetMatch, find_targets

__all__ = [
    "Attachment",
    "TargetMatch",
    "adapter_config",
    "adapter_parameters",
    "adapters",
    "attach",
    "attached_modules",
    "attachment",
    "detach",
    "find_targets",
    "is_merged",
    "lora_layers",
    "merge",
    "merged_copy",
    "named_adapter_parameters",
    "regauge_model",
    "regauge_optimizer_state",
    "unmerge",
    "whole_parameters",
]
