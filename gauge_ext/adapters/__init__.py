"""Adapters: what is added to a layer, and how it is described.

:mod:`config` is the description (rank, alpha, which modules), :mod:`patterns` the rules by which
names of modules are matched, :mod:`support` says which layers can carry an adapter, :mod:`lora` is
the adapted layer itself, :mod:`merging` what it is to merge one.

:mod:`gauge_field` and :mod:`fiber_bundle` are the seed's two classes, which hold their base as a
submodule (:mod:`wrapped`, :mod:`low_rank`) and know their own geometry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gauge_ext._lazy import deferred

if TYPE_CHECKING:
    from gauge_ext.adapters.config import LoRAConfig
    from gauge_ext.adapters.fiber_bundle import Fiber, FullFiberBundle, LoRAFiberBundle
    from gauge_ext.adapters.gauge_field import LoRAGaugeField, ParallelPath
    from gauge_ext.adapters.lora import LoRALinear
    from gauge_ext.adapters.support import unsupported_reason
    from gauge_ext.adapters.wrapped import WrappedAdapter
else:
    __getattr__, __dir__ = deferred(__name__)

__all__ = [
    "Fiber",
    "FullFiberBundle",
    "LoRAConfig",
    "LoRAFiberBundle",
    "LoRAGaugeField",
    "LoRALinear",
    "ParallelPath",
    "WrappedAdapter",
    "unsupported_reason",
]
