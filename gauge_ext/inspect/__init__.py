"""What an adapter does to each layer, in numbers that no choice of factors can change.

An adapter stores two factors, but only their product ``delta_weight = scaling * lora_B @ lora_A``
acts: ``(lora_B @ G^-1, G @ lora_A)`` is the same adapter for every invertible ``G`` of GL(r), the
gauge group. Norms of ``lora_A`` or ``lora_B`` alone therefore say nothing; everything here is a
function of the singular values of delta_weight, which is what all gauges share.

:mod:`spectrum` is the mathematics, :mod:`adapter` applies it to a saved adapter, :mod:`render`
draws the table.
"""

from __future__ import annotations

from gauge_ext.inspect.adapter import AdapterInspection, LayerInspection, inspect_adapter
from gauge_ext.inspect.render import SORT_KEYS, render
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum

__all__ = [
    "SORT_KEYS",
    "AdapterInspection",
    "LayerInspection",
    "Spectrum",
    "delta_spectrum",
    "inspect_adapter",
    "render",
]
