"""GaugeAdam: Adam for updates instead of factors."""

from __future__ import annotations

from typing import Any

from gauge_ext import ops
from gauge_ext.optim.base import FactorOptimizer, Layers, Params


class GaugeAdam(FactorOptimizer):
    r"""Adam on factor pairs, the same in every gauge.

    Adam keeps a second moment for each entry of a factor, and entries mix when the gauge changes.
    What does not change are lengths in the metric: of row i of :math:`g_B`, seen in an orthonormal
    basis of the row space of X, and of column j of :math:`g_A` in one of the column space. With
    :math:`A A^T = R_A^T R_A` and :math:`B^T B + \delta (A A^T)^{-1} = R_M^T R_M`,

    .. math::
        q &\leftarrow \beta_1 q + (1 - \beta_1) g, \qquad
        v_{B,i} \leftarrow \beta_2 v_{B,i} + (1 - \beta_2) \tfrac1r \|(g_B R_A^{-1})_i\|^2, \\
        B &\leftarrow \rho B - \eta\, \hat D_B^{-1}\, \hat q_B R_A^{-1} R_A^{-T}, \qquad
        \hat D_B = \mathrm{diag}(\sqrt{\hat v_B} + \epsilon), \quad \rho = \sqrt{1 - \eta\lambda}

    and for A the same with columns and :math:`R_M`. The averages :math:`q` are of the gradients as
    they come, which are covectors and so move with the gauge. The state is half of Adam's: q, and
    one number for each row and column of X. Learning rates are of about the size of AdamW's.

    Args:
        params: See :class:`FactorOptimizer`; :func:`~gauge_ext.optim.factor_pairs` finds the pairs.
        lr: :math:`\eta`; about how far an entry of X moves in a step, over the root of r.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`, in units of the gradient by X.
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
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    def step_pairs(self, layers: Layers, group: dict[str, Any], grad_scale: float) -> None:
        """Change the factors of ``layers`` in place."""
        avg_A, avg_B, sq_A, sq_B, steps = [], [], [], [], []
        for (a, b), value_a, value_b in zip(layers.parameters, layers.A, layers.B, strict=True):
            state_a, state_b = self.state[a], self.state[b]
            if not state_a:
                state_a["step"] = state_b["step"] = 0
                state_a["exp_avg"] = self.moments(a, value_a.shape)
                state_b["exp_avg"] = self.moments(b, value_b.shape)
                state_a["column_sq"] = self.moments(a, value_a.shape[1:])
                state_b["row_sq"] = self.moments(b, value_b.shape[:1])
            avg_A.append(state_a["exp_avg"])
            avg_B.append(state_b["exp_avg"])
            sq_A.append(state_a["column_sq"])
            sq_B.append(state_b["row_sq"])
            steps.append(state_a["step"] + 1)
        beta1, beta2 = group["betas"]
        ops.gauge_adam_step(
            *(layers.A, layers.B, layers.grad_A, layers.grad_B, avg_A, avg_B, sq_A, sq_B),
            *(layers.scaling, layers.anchors, steps),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            damping=group["damping"],
            grad_scale=grad_scale,
        )
        # Only now: a step that was refused was none.
        for (a, b), step in zip(layers.parameters, steps, strict=True):
            self.state[a]["step"] = self.state[b]["step"] = step
