"""What an adapter does to each layer, in numbers that no choice of factors can change.

An adapter stores two factors, but only their product ``delta_weight = scaling * lora_B @ lora_A``
acts: ``(lora_B @ G^-1, G @ lora_A)`` is the same adapter for every invertible ``G`` of GL(r), the
gauge group. Norms of ``lora_A`` or ``lora_B`` alone therefore say nothing, and nearly everything
here is a function of delta_weight. The exceptions say so: how balanced the stored factors are, and
what rounding them would cost.

:mod:`adapter` puts it together for a saved adapter. :mod:`spectrum` is its singular values,
:mod:`against_base` the base's weights beside it, :mod:`compare` other adapters, :mod:`factors` and
:mod:`precision` the stored factors, :mod:`readers` what other programs make of the file.
:mod:`render` draws it in a terminal and :mod:`report` as a page; :mod:`monitor` follows a training
run.
"""

from __future__ import annotations

from gauge_ext.inspect.adapter import (
    PRUNING_LOSSES,
    AdapterInspection,
    LayerInspection,
    inspect_adapter,
)
from gauge_ext.inspect.against_base import BaseShare, base_shares
from gauge_ext.inspect.compare import (
    DUPLICATE_DISTANCE,
    Comparison,
    LayerComparison,
    compare,
)
from gauge_ext.inspect.factors import FactorBalance, factor_balance
from gauge_ext.inspect.monitor import AdapterMonitor, LayerRecord, trainer_callback
from gauge_ext.inspect.precision import FORMATS, RoundingErrors, rounding_error, rounding_errors
from gauge_ext.inspect.readers import READERS, Finding, find_misreadings
from gauge_ext.inspect.render import SORT_KEYS, render
from gauge_ext.inspect.report import html_report
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum

__all__ = [
    "DUPLICATE_DISTANCE",
    "FORMATS",
    "PRUNING_LOSSES",
    "READERS",
    "SORT_KEYS",
    "AdapterInspection",
    "AdapterMonitor",
    "BaseShare",
    "Comparison",
    "FactorBalance",
    "Finding",
    "LayerComparison",
    "LayerInspection",
    "LayerRecord",
    "RoundingErrors",
    "Spectrum",
    "base_shares",
    "compare",
    "delta_spectrum",
    "factor_balance",
    "find_misreadings",
    "html_report",
    "inspect_adapter",
    "render",
    "rounding_error",
    "rounding_errors",
    "trainer_callback",
]
