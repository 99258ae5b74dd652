"""Adapters: what is added to a layer, and how it is described.

:mod:`config` is the description (rank, alpha, which modules), :mod:`patterns` the rules by which
names of modules are matched, :mod:`spec` the numbers of one layer's adapter, :mod:`protocol` what
the layers above ask of it. A layer with adapters is built up from :mod:`slot`, the parameters of
one, by :mod:`parts`, their layout on a weight, :mod:`many`, their names and which of them work,
and :mod:`mergeable` to :mod:`layer`, what all kinds have in common. :mod:`branches` computes linear
layers and :mod:`additive` others, :mod:`lora` and its neighbours are one kind each, and
:mod:`registry` tells which kind stands in for which class.

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
    from gauge_ext.adapters.layer import AdaptedLayer
    from gauge_ext.adapters.lora import LoRALinear
    from gauge_ext.adapters.low_rank import LowRankAdapter
    from gauge_ext.adapters.protocol import Adapter, Kind
    from gauge_ext.adapters.registry import adapt, unsupported_reason, variant_for
    from gauge_ext.adapters.spec import AdapterSpec
    from gauge_ext.adapters.wrapped import WrappedAdapter
else:
    __getattr__, __dir__ = deferred(__name__)

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "AdapterSpec",
    "Fiber",
    "FullFiberBundle",
    "Kind",
    "LoRAConfig",
    "LoRAFiberBundle",
    "LoRAGaugeField",
    "LoRALinear",
    "LowRankAdapter",
    "ParallelPath",
    "WrappedAdapter",
    "adapt",
    "unsupported_reason",
    "variant_for",
]
