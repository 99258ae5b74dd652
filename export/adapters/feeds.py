"""What a graph with adapter inputs is fed so that it does what a torch model does."""

from __future__ import annotations

from torch import nn

from gauge_ext.export.adapters.file import effective_factors
from gauge_ext.export.adapters.table import AdapterTable, Arrays
from gauge_ext.models import lora_layers


def adapter_feeds(table: AdapterTable, model: nn.Module) -> Arrays:
    """The factors of the adapters on ``model``, or what stands for none.

    Raises:
        AdapterMismatchError: the graph has no inputs for one of them.
    """
    if not lora_layers(model):
        return table.empty(rank=1) if table.form == "required" else {}
    factors, _, what = effective_factors(model)
    return table.pack(factors, what)
