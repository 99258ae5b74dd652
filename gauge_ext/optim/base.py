"""What the optimizers of factor pairs have in common: groups, clipping, state, other parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gauge_ext import ops
from gauge_ext.errors import ConfigError
from gauge_ext.optim.pairs import FactorPair, Matrix, checked
from gauge_ext.optim.sharded import is_sharded, keep_part, part_of, whole

Params = Iterable[FactorPair] | Iterable[Tensor] | Iterable[Mapping[str, Any]]

_ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}


class Layers:
    """The pairs of a group that have gradients, as lists that an op takes."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.A: list[Tensor] = []
        self.B: list[Tensor] = []
        self.grad_A: list[Tensor] = []
        self.grad_B: list[Tensor] = []
        self.parameters: list[tuple[Tensor, Tensor]] = []
        self.scaling: list[float] = []
        self.anchors: list[int] = []
        self._copies: list[Matrix] = []
        self._gathered: list[tuple[Tensor, Tensor]] = []
        params = group["params"]
        pairs = zip(params[::2], params[1::2], group["scalings"], group["anchors"], strict=True)
        for a, b, scaling, anchor in pairs:
            if a.grad is None and b.grad is None:
                continue
            self.parameters.append((a, b))
            self.scaling.append(scaling)
            self.anchors.append(anchor)
            for factor, values, grads in ((a, self.A, self.grad_A), (b, self.B, self.grad_B)):
                grad = factor.grad
                if grad is None:
                    grad = torch.zeros_like(factor)
                value = factor
                if is_sharded(factor):
                    value, grad = whole(factor), whole(grad)
                    self._gathered.append((factor, value))
                if value.ndim == 2 and value.is_contiguous() and grad.is_contiguous():
                    values.append(value)
                    grads.append(grad)
                else:
                    matrix = Matrix(value)
                    values.append(matrix.value)
                    grads.append(matrix.like(grad))
                    if not matrix.shares:
                        self._copies.append(matrix)

    def finish(self) -> None:
        """Write back what could not be changed in place, and tell autograd."""
        for matrix in self._copies:
            matrix.write_back()
        for factor, value in self._gathered:
            if is_sharded(factor):
                keep_part(factor, value)
        torch.autograd.graph.increment_version(itertools.chain.from_iterable(self.parameters))


class FactorOptimizer(torch.optim.Optimizer):
    """An optimizer of factor pairs whose steps change updates alike in every gauge.

    Alike up to how the factors are stored. In a gauge of condition c their product loses up to c
    times their rounding, which no step can mend: the first step from B = 0 (64 x 48, r = 8,
    ScaledGD or GaugeAdam) differs from that in float64 by 1e-7, 1e-5 and 1e-3 of X in float32 at
    conditions 1, 1e3 and 1e5; in bfloat16 by 3e-3, 0.05 and 0.35 at 1, 1e2 and 1e3, and by all of
    X at 1e5; in float64 by 3e-12 at 1e5. Factors as ``attach()`` draws them have a condition near
    1; :func:`~gauge_ext.regauge` brings others there.

    It runs under DDP as it is. Make it after ``fully_shard()`` for FSDP2: factors that are DTensors
    and their gradients are gathered for a step, which every process then computes whole, and each
    keeps its part. The state of factors is whole on every process, so ``state_dict()`` of a sharded
    run loads into an unsharded one and back; ``step()`` and ``grad_norm()`` are collective there.

    Args:
        params: Factor pairs; or parameters, which are trained by AdamW; or groups of either, as
            mappings with ``"pairs"`` or ``"params"`` and options of their own.
        defaults: The options of pairs.

    Raises:
        ConfigError: An option has a value that cannot be used, or a pair is none.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        groups: list[Any] = list(params)
        if groups and isinstance(groups[0], FactorPair):
            groups = [{"pairs": groups}]
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add pairs, or parameters for AdamW, with options of their own.

        Args:
            param_group: ``"pairs"``, a list of :class:`FactorPair`, or ``"params"``, and options.

        Raises:
            ConfigError: See the class.
        """
        group = dict(param_group)
        if "pairs" in group:
            if "params" in group:
                raise ConfigError("a group has either pairs or params, and this one has both.")
            pairs = [checked(FactorPair(*pair)) for pair in group.pop("pairs")]
            group["params"] = [factor for pair in pairs for factor in pair[:2]]
            group["scalings"] = [float(pair.scaling) for pair in pairs]
            # Which factor has full rank: 1 where training starts from A = 0, as in embeddings.
            group["anchors"] = [
                int(not whole(pair.lora_A).any() and bool(whole(pair.lora_B).any()))
                for pair in pairs
            ]
        elif "scalings" not in group:
            group["scalings"] = None
            for key, value in _ADAMW.items():
                group.setdefault(key, self.defaults.get(key, value))
        self.check_options({**self.defaults, **group})
        super().add_param_group(group)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options with values that cannot be used."""
        for name in ("lr", "weight_decay", "damping", "eps"):
            value = options.get(name, 0.0)
            if isinstance(value, Tensor) or not value >= 0.0:
                raise ConfigError(f"{name} must be a number of at least 0, got {value}.")
        for beta in options.get("betas", ()):
            if not 0.0 <= beta < 1.0:
                raise ConfigError(f"betas must lie in [0, 1), got {options['betas']}.")
        limit = options.get("max_grad_norm")
        if limit is not None and not limit > 0.0:
            raise ConfigError(f"max_grad_norm must be above 0 or None, got {limit}.")

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Computes the loss and its gradients anew, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A lora_A has a rank below r, a factor holds NaN, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["scalings"] is None:
                self._step_others(group)
                continue
            layers = Layers(group)
            if layers.parameters:
                self.step_pairs(layers, group, self._clip(layers, group))
                layers.finish()
        return loss

    def step_pairs(self, layers: Layers, group: dict[str, Any], grad_scale: float) -> None:
        """Change the factors of ``layers`` in place; ``grad_scale`` times the gradients count."""
        raise NotImplementedError

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        r"""Return the length of the gradients of all pairs, the same in every gauge.

        .. math:: \Bigl(\sum \mathrm{tr}\, g_B (A A^T)^{-1} g_B^T
            + \mathrm{tr}\, g_A^T (B^T B + \delta (A A^T)^{-1})^{-1} g_A\Bigr)^{1/2}

        the norm in the dual of the invariant metric; it is what ``max_grad_norm`` bounds, and about
        the norm of the gradient by X along the directions that a step can go.

        Returns:
            ``()`` in float64; 0 where nothing has a gradient.
        """
        total = torch.zeros((), dtype=torch.float64)
        for group in self.param_groups:
            if group["scalings"] is not None:
                total = total + self._norm_squared(Layers(group), group)
        return total.sqrt()

    def _norm_squared(self, layers: Layers, group: Mapping[str, Any]) -> Tensor:
        if not layers.parameters:
            return torch.zeros((), dtype=torch.float64)
        return ops.factor_gradient_norm(
            *(layers.A, layers.B, layers.grad_A, layers.grad_B, layers.scaling),
            layers.anchors,
            damping=group["damping"],
        ).cpu()

    def _clip(self, layers: Layers, group: Mapping[str, Any]) -> float:
        limit = group["max_grad_norm"]
        if limit is None:
            return 1.0
        norm = float(self._norm_squared(layers, group)) ** 0.5
        return float(min(1.0, limit / (norm + 1e-6)))

    def moments(self, factor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return zeros for a part of a factor's state: float32, or float64 for a float64 factor."""
        dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
        return torch.zeros(*shape, dtype=dtype, device=factor.device)

    def _step_others(self, group: dict[str, Any]) -> None:
        """AdamW as torch has it, for what is no factor of a pair."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        params, grads, averages, squares, steps = lists
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            params.append(p)
            grads.append(p.grad)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        if params:
            beta1, beta2 = group["betas"]
            adamw(
                *(params, grads, averages, squares, [], steps),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; the scalings stay those of these pairs.

        Args:
            state_dict: Of a run with the same groups, sharded or not.

        Raises:
            ConfigError: It holds parts of a sharded parameter that is none of a pair, and here the
                parameter is whole.
        """
        scalings = [group["scalings"] for group in self.param_groups]
        saved = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        own = [(p, g["scalings"] is not None) for g in self.param_groups for p in g["params"]]
        matched = list(zip(saved, own, strict=False))  # torch refuses if they are not as many
        for key, (p, _) in matched:
            values = state_dict["state"].get(key, {}).values()
            if not is_sharded(p) and any(map(is_sharded, values)):
                raise ConfigError(
                    f"the state of parameter {key} is one process's part of a sharded run, and the "
                    f"parameter of shape {tuple(p.shape)} is whole here.",
                    hint="Save torch.distributed.checkpoint.state_dict.get_optimizer_state_dict("
                    "..., options=StateDictOptions(full_state_dict=True)).",
                )
        super().load_state_dict(state_dict)
        for group, scaling in zip(self.param_groups, scalings, strict=True):
            group["scalings"] = scaling
        for key, (p, is_factor) in matched:
            for name, value in state_dict["state"].get(key, {}).items():
                if not isinstance(value, Tensor):
                    continue
                state = self.state[p]
                # torch has cast it to the dtype of the parameter; in half precision it is float32.
                if value.dtype != state[name].dtype:
                    state[name] = value.to(state[name].device, copy=True)
                if is_sharded(p) and not is_factor and value.ndim and not is_sharded(value):
                    state[name] = part_of(state[name], p)
