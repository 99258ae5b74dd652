"""LoRA adapters by a compiled op, as points of a fibre bundle, and their way into ONNX Runtime."""

from gauge_ext import ops
from gauge_ext._version import __version__
from gauge_ext.adapters import LoRAConfig, LoRAFiberBundle, LoRAGaugeField, LoRALinear
from gauge_ext.checkpoint import load_adapter, save_adapter
from gauge_ext.checkpoint.gauges import fingerprint, regauge
from gauge_ext.errors import GaugeError
from gauge_ext.merging import combine
from gauge_ext.models import (
    adapter_parameters,
    attach,
    detach,
    merge,
    named_adapter_parameters,
    unmerge,
)

__all__ = [
    "GaugeError",
    "LoRAConfig",
    "LoRAFiberBundle",
    "LoRAGaugeField",
    "LoRALinear",
    "__version__",
    "adapter_parameters",
    "attach",
    "combine",
    "detach",
    "fingerprint",
    "load_adapter",
    "merge",
    "named_adapter_parameters",
    "ops",
    "regauge",
    "save_adapter",
    "unmerge",
]
