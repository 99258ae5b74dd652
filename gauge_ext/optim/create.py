"""One call from a model to an optimizer of its adapters."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.optim.gauge_adam import GaugeAdam
from gauge_ext.optim.lora_plus import lora_plus_groups
from gauge_ext.optim.lora_rite import LoRARITE
from gauge_ext.optim.pairs import factor_pairs
from gauge_ext.optim.scaled_gd import ScaledGD

OptimizerName = Literal["gauge_adam", "scaled_gd", "lora_rite", "lora_plus", "adamw"]

_FACTOR_OPTIMIZERS = {"gauge_adam": GaugeAdam, "scaled_gd": ScaledGD, "lora_rite": LoRARITE}


def create_optimizer(
    model: nn.Module,
    name: OptimizerName = "gauge_adam",
    *,
    lr: float,
    weight_decay: float = 0.0,
    other_lr: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer for everything in a model that is to be trained.

    lora_A and lora_B of each layer are paired by themselves: linear, embedding and convolution
    layers of this package, and PEFT's. All else that requires gradients (heads, norms, biases,
    magnitudes, factors whose partner is frozen) is trained by AdamW in a group of its own of the
    same optimizer.

    Args:
        model: A model with adapters.
        name: ``"gauge_adam"``, ``"scaled_gd"`` and ``"lora_rite"`` are the same in every gauge;
            ``"lora_plus"`` and ``"adamw"`` are ``torch.optim.AdamW``.
        lr: The learning rate of the factors.
        weight_decay: Of all groups; on factor pairs of the invariant optimizers it shrinks X.
        other_lr: The learning rate of what is no factor; None: ``lr``.
        **options: Passed on: ``damping``, ``betas``, ``momentum``, ``max_grad_norm``, ``ratio`` ...

    Raises:
        ConfigError: There is no such optimizer or option, an option has a value that cannot be
            used, or the model has nothing to train.
    """
    if name not in get_args(OptimizerName):
        names = ", ".join(get_args(OptimizerName))
        raise ConfigError(f"there is no optimizer {name!r}; there are {names}.")
    try:
        if name == "lora_plus":
            ratio = {"ratio": options.pop("ratio")} if "ratio" in options else {}
            groups = lora_plus_groups(model, lr, weight_decay=weight_decay, **ratio)
            return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, **options)
        pairs = factor_pairs(model) if name in _FACTOR_OPTIMIZERS else []
        own = {id(factor) for pair in pairs for factor in pair[:2]}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        made: list[dict[str, Any]] = []
        if pairs:
            made.append({"pairs": pairs})
        if others:
            made.append({"params": others, "lr": lr if other_lr is None else other_lr})
        if not made:
            raise ConfigError(
                "the model has nothing to train.", hint="Call gauge_ext.attach() first."
            )
        kind = _FACTOR_OPTIMIZERS.get(name, torch.optim.AdamW)
        optimizer: torch.optim.Optimizer = kind(made, lr=lr, weight_decay=weight_decay, **options)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these options: {error}.") from error
    return optimizer
