"""LoRA adapters by a compiled op, as points of a fibre bundle, and their way into ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gauge_ext._lazy import deferred, import_with_torch
from gauge_ext._version import __version__

if TYPE_CHECKING:
    from gauge_ext import ops
    from gauge_ext.adapters import LoRAConfig, LoRAFiberBundle, LoRAGaugeField, LoRALinear
    from gauge_ext.checkpoint import load_adapter, save_adapter
    from gauge_ext.checkpoint.gauges import fingerprint, regauge
    from gauge_ext.checkpoint.many import load_adapters, save_adapters, swap_adapter
    from gauge_ext.checkpoint.residual import merge_with_residual
    from gauge_ext.errors import GaugeError
    from gauge_ext.merging import combine
    from gauge_ext.models.adapted import adapter_parameters, named_adapter_parameters
    from gauge_ext.models.attach import attach, detach
    from gauge_ext.models.fidelity import merge_fidelity, merge_stochastic
    from gauge_ext.models.many import add_adapter, delete_adapter, rename_adapter
    from gauge_ext.models.merge import merge, merge_and_unload, unmerge
    from gauge_ext.models.roster import adapter_names
    from gauge_ext.models.working import (
        active_adapters,
        adapter_rows,
        disable_adapters,
        set_adapters,
        use_adapters,
    )
else:
    __getattr__, __dir__ = deferred(__name__)

import_with_torch("gauge_ext.ops")

__all__ = [
    "GaugeError",
    "LoRAConfig",
    "LoRAFiberBundle",
    "LoRAGaugeField",
    "LoRALinear",
    "__version__",
    "active_adapters",
    "adapter_names",
    "adapter_parameters",
    "adapter_rows",
    "add_adapter",
    "attach",
    "combine",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "fingerprint",
    "load_adapter",
    "load_adapters",
    "merge",
    "merge_and_unload",
    "merge_fidelity",
    "merge_stochastic",
    "merge_with_residual",
    "named_adapter_parameters",
    "ops",
    "regauge",
    "rename_adapter",
    "save_adapter",
    "save_adapters",
    "set_adapters",
    "swap_adapter",
    "unmerge",
    "use_adapters",
]
