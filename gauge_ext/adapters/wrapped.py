"""Adapters that hold their base as a submodule, as the seed of this project wrote them."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters.dtypes import FLOAT_DTYPES
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.merging import add_update
from gauge_ext.errors import AdapterStateError, TargetError

# Rounding of one product of the probe in _acts_by_weight, relative to its largest term.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_PROBE_TOLERANCE_HALF = 5e-2


class WrappedAdapter(nn.Module):
    r"""A frozen base with a linear update beside it: :math:`y = \mathrm{base}(x) + x \Delta W^T`.

    The base is any module that has a matrix ``weight`` (out, in), such as an ``nn.Linear``, or an
    integer ``dim`` alone. It is frozen, since the update is what is trained.

    A subclass says what the update is, by :meth:`update` and :meth:`delta_weight`, and so can be
    merged into one plain layer and exported to ONNX.

    Args:
        base_model: The base.

    Raises:
        TargetError: The base has neither such a weight nor ``dim``, or is an adapter itself.
    """

    base_model: nn.Module

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = _sizes(base_model)
        self.base_model = base_model.requires_grad_(False)

    def update(self, x: Tensor) -> Tensor:
        """Return ``x @ delta_weight.T``, ``(*batch, out)``, differentiably."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """Return the update of the weight, ``(out, in)``, in float32, or float64 if a part is."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            input: x, ``(*batch, in)``.

        Returns:
            ``(*batch, out)``, of x's dtype.
        """
        y: Tensor = self.base_model(input)
        return y + self.update(input).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self, *, safe: bool = True) -> Tensor:
        """Return ``W + delta_weight`` in the dtype of the base's weight W, rounded to it once.

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            AdapterStateError: The base has no weight.
            NonFiniteError: The base, the update or the sum holds NaN or infinity.
        """
        parts = dict(self.named_parameters())
        return add_update(self._base_weight(), self.delta_weight(), parts, safe=safe)

    def to_linear(self, *, safe: bool = True) -> nn.Module:
        """Return a plain layer that computes the same: the base's kind, with the merged weight.

        This module and its base stay as they are. The new layer shares the base's other parameters,
        such as the bias. A base that is no plain ``nn.Linear`` is asked first whether it acts as
        its weight says.

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            AdapterStateError: The update cannot be put into the base's weight.
            NonFiniteError: See :meth:`merged_weight`.
        """
        base = self.base_model
        if reason := self.unmergeable_reason():
            raise AdapterStateError(
                f"the update cannot be merged into this {type(base).__name__}: {reason}.",
                hint="Use the module as it is; it exports to ONNX so, too.",
            )
        memo: dict[int, object] = {id(p): p for p in base.parameters()}
        memo[id(base.weight)] = nn.Parameter(self.merged_weight(safe=safe), requires_grad=False)
        return copy.deepcopy(base, memo)

    merge = to_linear

    def unmergeable_reason(self) -> str | None:
        """Say why the update cannot be put into the base's weight, or return None where it can."""
        base = self.base_model
        if any(isinstance(module, AdaptedLayer | WrappedAdapter) for module in base.modules()):
            return "it carries another adapter, which would be counted twice or lost"
        weight = base._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            return "its weight is not a plain parameter with two sides"
        if is_plain(base) or _acts_by_weight(base, weight):
            return None
        return "its output is not x Wᵀ plus what doesn't depend on W"

    def _base_weight(self) -> Tensor:
        weight = getattr(self.base_model, "weight", None)
        if not isinstance(weight, Tensor):
            raise AdapterStateError(
                f"this {type(self.base_model).__name__} has no weight to add the update to, only "
                "a dim."
            )
        return weight

    def _like(self) -> Tensor:
        """A tensor of the base's dtype and device."""
        weight = getattr(self.base_model, "weight", None)
        if isinstance(weight, Tensor):
            return weight
        floating = (p for p in self.base_model.parameters() if p.is_floating_point())
        return next(floating, torch.empty(0))


def _sizes(base: nn.Module) -> tuple[int, int]:
    """(out, in) of the base's map."""
    if not isinstance(base, nn.Module):
        raise TargetError(f"base_model must be an nn.Module, got a {type(base).__name__}.")
    if isinstance(base, AdaptedLayer | WrappedAdapter):
        raise TargetError(
            f"base_model must be a plain layer, and this {type(base).__name__} has an adapter "
            "already."
        )
    weight, dim = getattr(base, "weight", None), getattr(base, "dim", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        if weight.dtype not in FLOAT_DTYPES:
            raise TargetError(
                f"base_model must have a floating-point weight, and it is {weight.dtype}."
            )
        return weight.shape[0], weight.shape[1]
    if isinstance(dim, int) and dim >= 1:
        return dim, dim
    raise TargetError(
        f"base_model must have a matrix `weight` (out, in) or an integer `dim`, and this "
        f"{type(base).__name__} has neither.",
        hint="Wrap the layers of a model one by one, or use gauge_ext.attach().",
    )


def is_plain(base: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the base is F.linear on its weight and bias, and nothing else."""
    return (
        isinstance(base, nn.Linear)
        and type(base).forward is nn.Linear.forward
        and "forward" not in vars(base)
        and not (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
        )
    )


@torch.no_grad()
def _acts_by_weight(base: nn.Module, weight: Tensor) -> bool:
    """Whether a change D of the base's weight changes its output by x Dᵀ, tried on one example."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    out, size = weight.shape
    x, change = draw(3, size), draw(out, size)
    try:
        before = base(x)
        after = torch.func.functional_call(base, {"weight": weight + change}, (x,))
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = before + F.linear(x, change)
    if after.shape != expected.shape:
        return False
    tolerance = _PROBE_TOLERANCE.get(weight.dtype, _PROBE_TOLERANCE_HALF)
    return bool((after - expected).abs().max() <= tolerance * expected.abs().max())
