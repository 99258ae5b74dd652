"""Adapters: what is added to a layer, and how it is described.

:mod:`config` is the description (rank, alpha, which modules), :mod:`patterns` the rules by which
names of modules are matched, :mod:`support` says which layers can carry an adapter, :mod:`lora` is
the adapted layer itself.
"""

from __future__ import annotations

from gauge_ext.adapters.config import LoRAConfig
from gauge_ext.adapters.lora import LoRALinear
from gauge_ext.adapters.support import unsupported_reason

__all__ = ["LoRAConfig", "LoRALinear", "unsupported_reason"]
