"""Adapters on whole models: which modules get one, putting them on and taking them off, merging.

:mod:`targets` finds the modules, :mod:`attach` puts adapters on them and off again, :mod:`adapted`
tells what is on a model, :mod:`merge` turns adapter and base into one weight and back,
:mod:`regauge` changes the factors but not what they compute. Of several adapters on one model
:mod:`roster` knows the names, :mod:`many` takes them off and calls them otherwise, and
:mod:`working` says which work, in all calls or by an argument of one (:mod:`row_names`).
:mod:`fidelity` measures what a merge keeps of an update, :mod:`fast_path` keeps torch's fused
encoder layers from overlooking an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gauge_ext._lazy import deferred
from gauge_ext.models.adapted import (
    Attachment,
    adapter_config,
    adapter_parameters,
    adapters,
    attached_modules,
    attachment,
    lora_layers,
    named_adapter_parameters,
    whole_parameters,
)
from gauge_ext.models.attach import attach, detach
from gauge_ext.models.many import add_adapter, delete_adapter, rename_adapter
from gauge_ext.models.merge import is_merged, merge, merge_and_unload, merged_copy, unmerge
from gauge_ext.models.recomputing import recompute_inputs
from gauge_ext.models.regauge import regauge_model, regauge_optimizer_state
from gauge_ext.models.roster import adapter_names
from gauge_ext.models.shared_inputs import (
    group_shared_inputs,
    shared_input_groups,
    ungroup,
)
from gauge_ext.models.targets import TargetMatch, find_targets
from gauge_ext.models.working import (
    active_adapters,
    adapter_rows,
    disable_adapters,
    set_adapters,
    use_adapters,
)

if TYPE_CHECKING:
    # It shows its figures as a table, which nothing else here needs.
    from gauge_ext.models.fidelity import (
        LayerFidelity,
        MergeFidelity,
        merge_fidelity,
        merge_stochastic,
    )
else:
    __getattr__, __dir__ = deferred(__name__)

__all__ = [
    "Attachment",
    "LayerFidelity",
    "MergeFidelity",
    "TargetMatch",
    "active_adapters",
    "adapter_config",
    "adapter_names",
    "adapter_parameters",
    "adapter_rows",
    "adapters",
    "add_adapter",
    "attach",
    "attached_modules",
    "attachment",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "find_targets",
    "group_shared_inputs",
    "is_merged",
    "lora_layers",
    "merge",
    "merge_and_unload",
    "merge_fidelity",
    "merge_stochastic",
    "merged_copy",
    "named_adapter_parameters",
    "recompute_inputs",
    "regauge_model",
    "regauge_optimizer_state",
    "rename_adapter",
    "set_adapters",
    "shared_input_groups",
    "ungroup",
    "unmerge",
    "use_adapters",
    "whole_parameters",
]
