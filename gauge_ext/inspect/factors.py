"""What can be said of the stored factors themselves: how far they are from balanced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gauge_ext.geometry import LoRAPoint, quantisation_factor, to_gauge


@dataclass(frozen=True)
class FactorBalance:
    r"""How one layer's factors share the update between them; all of it depends on the gauge.

    Attributes:
        norm_ratio: :math:`\|s B\|_F / \|A\|_F`, 1 for balanced factors; 0 before training (B = 0).
        condition: cond(P) of the one symmetric positive P with (B P^-1, P A) balanced
            (:math:`B^T B = A A^T`): 1 for balanced factors; NaN where the update has a rank below
            r, since then P is not defined.
        quantisation_factor: By how much the expected squared error of rounding the factors to a
            floating-point format exceeds that of the best gauge, see
            :func:`gauge_ext.geometry.quantisation_factor`.
    """

    norm_ratio: float
    condition: float
    quantisation_factor: float


def factor_balance(point: LoRAPoint) -> FactorBalance:
    """Describe a pair of factors.

    Args:
        point: ``(scaling * lora_B, lora_A)``, without batch dimensions.
    """
    exact = point.to(torch.float64)
    a = float(exact.A.norm())
    condition = math.nan
    if int(exact.numerical_rank()) == exact.rank:
        values = torch.linalg.svdvals(to_gauge(exact, "balanced").G)
        condition = float(values[0] / values[-1])
    return FactorBalance(
        norm_ratio=float(exact.B.norm()) / a if a else math.inf,
        condition=condition,
        quantisation_factor=float(quantisation_factor(exact)),
    )
