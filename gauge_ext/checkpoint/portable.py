"""Adapters for servers that read little of the config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gauge_ext.checkpoint.format import LoRAPair
from gauge_ext.errors import ConfigError


@torch.no_grad()
def make_portable(
    pairs: Mapping[str, LoRAPair], scalings: Mapping[str, float]
) -> dict[str, LoRAPair]:
    """Return factors that mean the same with scaling 1 and one rank for all.

    The scaling goes into lora_B, and lower ranks are padded with zeros to the highest. What is
    written with ``alpha = r`` then needs no rsLoRA, no patterns and no base weights to be read
    right.

    Args:
        pairs: Path of the module -> its adapter.
        scalings: Path of the module -> s.

    Raises:
        ConfigError: An adapter is more than two factors (DoRA, ``lora_bias``), or is on a grouped
            convolution or a projection inside nn.MultiheadAttention.
    """
    rank = max(pair.rank for pair in pairs.values())
    found = {}
    for name, pair in pairs.items():
        grouped = pair.lora_A.shape[0] != pair.lora_B.shape[1]
        if len(pair.tensors) > 2 or grouped or pair.kind == "out_proj":
            raise ConfigError(
                f"{name} cannot be saved with portable=True: its adapter is "
                f"{', '.join(pair.tensors)} ({pair.kind}), and portable ones are two factors.",
                hint="Merge the adapter into the base, or save it as it is.",
            )
        wide = torch.promote_types(pair.lora_B.dtype, torch.float32)
        b = (pair.lora_B.to(wide) * scalings[name]).to(pair.lora_B.dtype)
        found[name] = LoRAPair(_padded(pair.lora_A, rank, 0), _padded(b, rank, 1), kind=pair.kind)
    return found


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], axis)
