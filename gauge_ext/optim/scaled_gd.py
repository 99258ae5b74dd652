"""ScaledGD: gradient descent in the invariant metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gauge_ext import ops
from gauge_ext.errors import ConfigError
from gauge_ext.optim.base import FactorOptimizer, Layers, Params


class ScaledGD(FactorOptimizer):
    r"""Scaled gradient descent on factor pairs (Tong, Ma, Chi, arXiv:2005.08898).

    .. math:: B \leftarrow \rho B - \eta\, q_B (A A^T)^{-1}, \qquad
        A \leftarrow \rho A - \eta\, \bigl(B^T B + \delta (A A^T)^{-1}\bigr)^{-1} q_A

    with :math:`q \leftarrow \mu q + g`, B the effective factor and
    :math:`\rho = \sqrt{1 - \eta\lambda}`. To first order X moves along the projection of
    :math:`-\nabla_X f` onto the rows and columns of X: how X is factored, the scale of either
    factor and the split of alpha between them do not matter. The damping is covariant and acts as
    the filter :math:`\sigma^2 / (\sigma^2 + \delta)` on the singular values of X, so that B = 0 may
    be the start; :math:`B^T B + \delta I` (arXiv:2402.02347) would depend on the gauge.

    Args:
        params: See :class:`FactorOptimizer`; :func:`~gauge_ext.optim.factor_pairs` finds the pairs.
        lr: :math:`\eta`, in the units of gradient descent on X.
        momentum: :math:`\mu`.
        nesterov: Look ahead along the momentum.
        weight_decay: :math:`\lambda`: each step X shrinks by :math:`1 - \eta\lambda`.
        damping: :math:`\delta`, in units of :math:`\sigma(X)^2`. Directions of X that are much
            smaller than :math:`\sqrt\delta` are held back on the side of A.
        max_grad_norm: Bounds :meth:`FactorOptimizer.grad_norm` of each group; None: no bound.

    Raises:
        ConfigError: An option has a value that cannot be used, or a pair is none.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-1,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options with values that cannot be used."""
        super().check_options(options)
        momentum = options["momentum"]
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"momentum must lie in [0, 1), got {momentum}.")
        if options["nesterov"] and momentum == 0.0:
            raise ConfigError("nesterov needs a momentum above 0, got 0.")

    def step_pairs(self, layers: Layers, group: dict[str, Any], grad_scale: float) -> None:
        """Change the factors of ``layers`` in place."""
        avg_A: list[Tensor] = []
        avg_B: list[Tensor] = []
        if group["momentum"] != 0.0:
            for (a, b), value_a, value_b in zip(layers.parameters, layers.A, layers.B, strict=True):
                for factor, value, averages in ((a, value_a, avg_A), (b, value_b, avg_B)):
                    state = self.state[factor]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = self.moments(factor, value.shape)
                    averages.append(state["momentum_buffer"])
        ops.scaled_gd_step(
            *(layers.A, layers.B, layers.grad_A, layers.grad_B, avg_A, avg_B, layers.scaling),
            layers.anchors,
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            damping=group["damping"],
            grad_scale=grad_scale,
        )
