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
        return table.nothing()
    factors, _, what = effective_factors(model)
    return table.pack(factors, what)


def feeds_by_case(table: AdapterTable, model: nn.Module) -> dict[str, Arrays]:
    """What a graph is fed without an adapter and, where ``model`` has one, with it.

    Returns:
        What to add to a case's name -> the arrays.
    """
    found = {"": table.nothing()}
    if lora_layers(model):
        found[", with adapter"] = adapter_feeds(table, model)
    return found
