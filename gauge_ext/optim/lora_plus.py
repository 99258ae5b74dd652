"""LoRA+: one learning rate for each factor."""

from __future__ import annotations

from typing import Any

from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.optim.pairs import factor_pairs


def lora_plus_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    r"""Make parameter groups for AdamW with a larger learning rate for B (arXiv:2402.12354).

    .. math:: \eta_A = \eta, \qquad \eta_B = \lambda\,\eta

    Everything else that is to be trained gets :math:`\eta`. The ratio is a choice of connection
    (docs/math.md, 3.3) and no cure for the gauge: AdamW's steps still depend on it.

    Args:
        model: A model with adapters of this package or of PEFT.
        lr: :math:`\eta`.
        ratio: :math:`\lambda`.
        weight_decay: Of all groups.

    Returns:
        Groups for ``torch.optim.AdamW``; those without parameters are left out.

    Raises:
        ConfigError: The ratio is not above 0, or there is nothing to train.
    """
    if not ratio > 0.0:
        raise ConfigError(f"ratio must be above 0, got {ratio}.")
    pairs = factor_pairs(model)
    factors = [pair.lora_A for pair in pairs], [pair.lora_B for pair in pairs]
    own = {id(factor) for side in factors for factor in side}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": params, "lr": rate, "weight_decay": weight_decay}
        for params, rate in ((factors[0], lr), (factors[1], lr * ratio), (others, lr))
        if params
    ]
    if not groups:
        raise ConfigError("the model has nothing to train.", hint="Call gauge_ext.attach() first.")
    return groups
