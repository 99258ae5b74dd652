"""Optimizers whose steps do not depend on how an adapter happens to be factored.

The factors of an update are one choice among all (B G^-1, G A). Plain gradient descent, momentum
and Adam train every choice differently; these train the update. :func:`create_optimizer` makes one
for a model; each is an ordinary torch optimizer.
"""

from gauge_ext.optim.base import FactorOptimizer
from gauge_ext.optim.create import OptimizerName, create_optimizer
from gauge_ext.optim.gauge_adam import GaugeAdam
from gauge_ext.optim.lora_plus import lora_plus_groups
from gauge_ext.optim.lora_rite import LoRARITE
from gauge_ext.optim.pairs import FactorPair, factor_pairs
from gauge_ext.optim.scaled_gd import ScaledGD

__all__ = [
    "FactorOptimizer",
    "FactorPair",
    "GaugeAdam",
    "LoRARITE",
    "OptimizerName",
    "ScaledGD",
    "create_optimizer",
    "factor_pairs",
    "lora_plus_groups",
]
