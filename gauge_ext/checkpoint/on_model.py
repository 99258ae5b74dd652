"""One adapter of a model, layer by layer, as a file has it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from gauge_ext.adapters import AdaptedLayer, Adapter
from gauge_ext.adapters.tied import TiedLinear
from gauge_ext.checkpoint.format import LoRAPair, turned
from gauge_ext.models.adapted import adapter_config, adapters, lora_layers
from gauge_ext.models.roster import sole_name
from gauge_ext.models.tied import tied_layers


class AdapterPart(NamedTuple):
    """What an adapter is on one layer.

    Attributes:
        layer: The layer; other adapters may be on it too. One that is tied to an embedding has its
            adapter.
        pair: The tensors.
        rank: The rank of the update that they are for.
        scaling: What ``lora_B @ lora_A`` is multiplied with.
    """

    layer: Adapter | TiedLinear
    pair: LoRAPair
    rank: int
    scaling: float


def adapter_parts(
    model: nn.Module, name: str | None, purpose: str
) -> tuple[str | None, dict[str, AdapterPart]]:
    """Find one of the adapters on ``model``.

    Args:
        model: The module that they were put on, or adapters that hold their base.
        name: Which; None: the only one, or the only active one.
        purpose: What it is wanted for, such as "saved", for the message.

    Returns:
        Its name, None where there are only adapters that hold their base, which have none; path of
        the layer -> what it is there.

    Raises:
        AdapterStateError: There are no adapters, none of that name, or several and it is not said
            which.
    """
    found = adapters(model)
    if lora_layers(model) or not found:
        name = sole_name(model, purpose) if name is None else name
        adapter_config(model, name)  # says what is wrong where there is none of that name
    else:
        name = None
    parts = {}
    for path, layer in found.items():
        if not isinstance(layer, AdaptedLayer) or name is None:
            parts[path] = AdapterPart(layer, LoRAPair.of(layer), layer.rank, layer.scaling)
        elif name in layer.names:
            slot = layer.adapter(name)
            pair = LoRAPair(**layer.tensors_of(slot), kind=layer.kind)
            parts[path] = AdapterPart(layer, pair, layer.rank_of(slot), slot.scaling)
    for path, head in tied_layers(model).items():
        if name is not None and name in head.source.names:
            slot = head.source.adapter(name)
            pair = turned(LoRAPair(**head.source.tensors_of(slot), kind="embedding"))
            parts[path] = AdapterPart(head, pair, pair.rank, slot.scaling)
    return name, parts
