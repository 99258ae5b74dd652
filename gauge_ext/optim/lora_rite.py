"""LoRA-RITE: matrix-valued second moments in orthonormal frames of the factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gauge_ext import ops
from gauge_ext.errors import ConfigError
from gauge_ext.optim.base import FactorOptimizer, Layers, Params

# Of RiteState, in its order: the factor whose state holds it, and its name there.
_STATE = (
    (0, "frame"),
    (1, "frame"),
    (0, "frame_avg"),
    (1, "frame_avg"),
    (0, "frame_sq"),
    (1, "frame_sq"),
    (1, "frame_rest"),
)


class LoRARITE(FactorOptimizer):
    r"""LoRA-RITE (Yen et al., arXiv:2410.20625): transformation-invariant Adam with r x r moments.

    With :math:`A A^T = R_A^T R_A` and the frame :math:`V = A^T R_A^{-1}` of the rows of X,

    .. math::
        \hat g &= g_B R_A^{-1}, \qquad P = V_t^T V_{t-1}, \\
        v &\leftarrow \beta_2 P v P^T + (1 - \beta_2)\, \hat g^T \hat g / m, \\
        q &\leftarrow \beta_1 q P^T + (1 - \beta_1)\, \hat g\,(\hat v^{1/2} + \epsilon)^{-1}, \qquad
        B \leftarrow \rho B - \eta\, \hat q R_A^{-T}

    and for A the same with :math:`R_M^T R_M = B^T B + \delta (A A^T)^{-1}` where the paper divides
    by :math:`R_B`, and the damped frame of the columns that belongs to it, so that B = 0 may be the
    start; :func:`gauge_ext.ops.lora_rite.lora_rite` has all of it. The paper's escaped mass, what
    of v the projection P loses, is not added, and there is no clipping but ``max_grad_norm``. The
    state is Adam's, two tensors of a factor's size for each, and three r x r matrices for a pair.
    A step of all layers is one compiled op on the CPU; on a GPU it is plain torch in float64,
    batched over layers of one shape.

    Args:
        params: See :class:`FactorOptimizer`; :func:`~gauge_ext.optim.factor_pairs` finds the pairs.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`, in units of the gradient by X.
        weight_decay: :math:`\lambda`: each step X shrinks by :math:`1 - \eta\lambda`.
        damping: :math:`\delta`, in units of :math:`\sigma(X)^2`. Directions of X that are much
            smaller than :math:`\sqrt\delta` are held back on the side of A, by
            :math:`(\sigma^2 / (\sigma^2 + \delta))^{3/2}`.
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
        lists: tuple[list[Tensor], ...] = tuple([] for _ in _STATE)
        steps = []
        for pair, value_a, value_b in zip(layers.parameters, layers.A, layers.B, strict=True):
            if not self.state[pair[0]]:
                self._start(pair, value_a, value_b)
            for kept, (factor, name) in zip(lists, _STATE, strict=True):
                kept.append(self.state[pair[factor]][name])
            steps.append(self.state[pair[0]]["step"] + 1)
        beta1, beta2 = group["betas"]
        ops.lora_rite_step(
            *(layers.A, layers.B, layers.grad_A, layers.grad_B, ops.RiteState(*lists)),
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

    def _start(self, pair: tuple[Tensor, Tensor], value_a: Tensor, value_b: Tensor) -> None:
        rank = value_a.shape[0]
        for factor, length in zip(pair, (value_a.shape[1], value_b.shape[0]), strict=True):
            self.state[factor].update(
                step=0,
                frame=self.moments(factor, (rank, length)),
                frame_avg=self.moments(factor, (rank, length)),
                frame_sq=self._square(factor, rank),
            )
        self.state[pair[1]]["frame_rest"] = self._square(pair[1], rank)

    @staticmethod
    def _square(factor: Tensor, rank: int) -> Tensor:
        return torch.zeros(rank, rank, dtype=torch.float64, device=factor.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; see :meth:`FactorOptimizer.load_state_dict`.

        Args:
            state_dict: Of a run with the same groups, sharded or not.

        Raises:
            ConfigError: The state of a factor is that of another optimizer, or of a version of this
                one that kept its moments in other frames.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if own["scalings"] is not None:
                _require_own(state_dict["state"], saved["params"])
        super().load_state_dict(state_dict)


def _require_own(state: Mapping[Any, Mapping[str, Any]], keys: list[Any]) -> None:
    for index, key in enumerate(keys):
        kept = set(state.get(key, {}))
        expected = {"step"} | {name for factor, name in _STATE if factor == index % 2}
        if kept and kept != expected:
            raise ConfigError(
                f"the state of factor {key} holds {', '.join(sorted(kept))}, and LoRARITE keeps "
                f"{', '.join(sorted(expected))}.",
                hint="It is of another optimizer, or was saved by an earlier version, whose frames "
                "were others: load the factors alone and start the optimizer anew.",
            )
