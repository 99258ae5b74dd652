"""Parameter groups for optimizers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gauge_ext.errors import AdapterStateError, ConfigError
from gauge_ext.models.attach import named_adapter_parameters

# What multiplies the inputs' projection on its way out, by the name in the layer.
_OUTPUT_FACTORS = frozenset({"lora_B", "phi", "frame"})


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    r"""Return parameter groups for LoRA+ (arXiv:2402.12354): B learns ``ratio`` times as fast as A.

    At large widths a step of A moves the features by a vanishing amount beside one of B of the same
    rate, so one rate for both is never right for both. The paper's choice for AdamW is
    :math:`\eta_B / \eta_A = 16`.

    Args:
        model: A model with adapters.
        lr: The rate of A, and of all that is no lora_B: magnitudes, biases, whole modules.
        ratio: That of lora_B over it, at least 1 in the paper.

    Returns:
        Two groups, each with ``params``, ``lr`` and ``name`` ("lora_A" or "lora_B"), for any
        optimizer of torch.

    Raises:
        AdapterStateError: The model has no adapters.
        ConfigError: A number cannot be used.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not math.isfinite(value) or value <= 0.0:
            raise ConfigError(f"{name} must be a number above 0, got {value!r}.")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for path, parameter in named_adapter_parameters(model):
        (fast if path.rpartition(".")[2] in _OUTPUT_FACTORS else slow).append(parameter)
    if not fast:
        raise AdapterStateError(
            "the model has no adapters, so there is nothing to group.",
            hint="Call gauge_ext.attach() or gauge_ext.load_adapter() first.",
        )
    return [
        {"params": slow, "lr": lr, "name": "lora_A"},
        {"params": fast, "lr": lr * ratio, "name": "lora_B"},
    ]
