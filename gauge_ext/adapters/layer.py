"""What all layers have in common that carry an adapter in place."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gauge_ext import ops
from gauge_ext.adapters import inits
from gauge_ext.adapters.dtypes import FLOAT_DTYPES
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.mergeable import MergeableLayer
from gauge_ext.adapters.merging import adapter_dtype
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.errors import AdapterStateError, TargetError

_ATTRIBUTES = (
    *("scaling", "dropout_p", "merged", "has_branch", "is_plain"),
    *("_kept", "_factor_names", "_start_names"),
)


class AdaptedLayer(MergeableLayer):
    r"""A layer of torch with a low-rank adapter beside one frozen weight.

    A layer becomes adapted by :meth:`adapt`, which exchanges its class in place: identity, hooks
    and the names of its parameters stay, and beside them come ``lora_A`` and ``lora_B``. Each kind
    of layer is one subclass in a file of its own, with one line in
    :mod:`gauge_ext.adapters.registry`. It says by the class attributes which classes of torch it
    stands in for and which weight it adapts, and defines ``forward``, :meth:`factor_shapes` and,
    where the update is not the matrix :math:`s\,B A`, :meth:`product`.

    Attributes:
        recomputes_input: Whether a linear layer's x is computed again for backward where that is
            cheap, instead of being kept, see :func:`gauge_ext.models.recompute_inputs`.
    """

    recomputes_input: bool = False

    @classmethod
    def adapt(cls, module: nn.Module, spec: AdapterSpec, name: str = DEFAULT) -> Self:
        """Turn ``module`` itself into an adapted layer and return it.

        Args:
            module: A layer for which :meth:`reason_against` is None.
            spec: Rank, scaling and the like.
            name: What the adapter is called.

        Raises:
            TargetError: The layer cannot carry this adapter.
        """
        if reason := cls.reason_against(module) or cls.reason_against_spec(module, spec):
            raise TargetError(f"an adapter cannot be put on this layer: {reason}.")
        before = type(module)
        layer = cast("Self", module)
        module.__class__ = variant_of(cls, before)
        try:
            layer._add_adapter(spec, name)
        except BaseException:
            for name in [name for name in module._parameters if name.startswith("lora_")]:
                module._parameters.pop(name, None)
            module.__class__ = before
            raise
        return layer

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Say whether this is the variant for the class of ``module``."""
        return type(module) in cls.bases

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Say why ``module`` cannot carry this adapter, or return None where it can."""
        if not cls.matches(module):
            kind = type(module)
            expected = " or ".join(f"nn.{base.__name__}" for base in cls.bases)
            return f"it is a {kind.__module__}.{kind.__qualname__}, not {expected}"
        if "forward" in vars(module):
            return "its forward was replaced on the object (by accelerate's hooks, perhaps)"
        weight = module._parameters.get(cls.weight_name)
        if weight is None:
            return f"its {cls.weight_name} is not a plain parameter (reparametrised or pruned)"
        if weight.dtype not in FLOAT_DTYPES:
            return (
                f"its {cls.weight_name} is {weight.dtype}, and only floating-point weights are "
                "supported"
            )
        return None

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        if not cls.is_linear and spec.init not in ("kaiming", "gaussian"):
            return f"init {spec.init!r} is for linear layers, and it is none"
        return None

    def _add_adapter(self, spec: AdapterSpec, name: str = DEFAULT) -> None:
        self._start_slot(self, spec)
        self._kept = {}
        self.merged, self.own_name = False, name
        self.set_active([(name, 1.0)])

    def add(self, name: str, spec: AdapterSpec) -> None:
        """Put a fresh adapter beside those that are there; it is not active yet.

        Raises:
            TargetError: The layer cannot carry such an adapter.
            AdapterStateError: It has one of that name.
        """
        if name in self.names:
            raise AdapterStateError(f"the layer has an adapter {name!r} already.")
        if reason := type(self).reason_against_spec(self, spec):
            raise TargetError(f"the adapter cannot be put on this layer: {reason}.")
        slot = AdapterSlot()
        self._start_slot(slot, spec)
        self.put_beside(name, slot)

    def _start_slot(self, slot: AdapterSlot, spec: AdapterSpec) -> None:
        """Give a slot the parameters and numbers of a fresh adapter on this layer."""
        weight = self.base_weight
        dtype = adapter_dtype(weight.dtype) if spec.dtype is None else spec.dtype
        shape_A, shape_B = self.factor_shapes(self, spec.rank)
        a = torch.empty(shape_A, dtype=dtype, device=weight.device)
        b = torch.empty(shape_B, dtype=dtype, device=weight.device)
        self.start_factors(a, b, spec)
        slot.lora_A = nn.Parameter(a)
        slot.lora_B = nn.Parameter(b)
        slot.scaling = float(spec.scaling)
        slot.dropout_p = float(spec.dropout)
        slot._factor_names = ("lora_A", "lora_B")
        slot._start_names = ()
        if inits.starts_nonzero(spec.init):
            slot.keep_start()
        if spec.use_dora:
            norms = ops.dora_row_norms(*self.matrices(slot), slot.scaling)
            magnitude = norms.to(dtype).reshape(self.magnitude_shape())
            slot.lora_magnitude = nn.Parameter(magnitude)
            slot._factor_names += ("lora_magnitude",)
        if spec.lora_bias:
            outputs = weight.shape[self.output_axis]
            slot.lora_bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=weight.device))
            slot._factor_names += ("lora_bias",)

    @torch.no_grad()
    def start_at(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Start a linear layer's factors at values whose product then counts as zero.

        Args:
            lora_A: ``(r, in)``.
            lora_B: ``(out, r)``.
        """
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        self.keep_start()
        self.settle()

    def start_factors(self, lora_A: Tensor, lora_B: Tensor, spec: AdapterSpec) -> None:
        """Fill fresh factors; where the layer is not linear, such that their product is zero."""
        inits.start(lora_A, lora_B, spec.init, self._start_weight(), spec.scaling)

    def _start_weight(self) -> Tensor:
        """The weight as ``(out, in)``, for starts that depend on it."""
        weight = self.base_weight
        return weight.mT if self.output_axis and weight.dim() == 2 else weight

    def to_base(self) -> nn.Module:
        """Drop the adapter and be a plain layer again, with the weight of the moment."""
        for name in (*self.own_names(), *_ATTRIBUTES):
            delattr(self, name)
        vars(self).pop("recomputes_input", None)
        self.forget_names()
        base = cast("nn.Module", self)
        base.__class__ = type(self).base_class
        return base

    def extra_repr(self) -> str:
        """Say what the base says, rank, scaling and dropout, and the names of several adapters."""
        merged = ", merged" if self.merged else ""
        base = super().extra_repr()
        named = ""
        if self.further:
            active = ", ".join(f"{name} x {weight:g}" for name, weight in self.active)
            named = f", adapters={list(self.names)}, active=[{active}]"
        return (
            f"{base}{', ' if base else ''}rank={self.rank}, scaling={self.scaling:g}, "
            f"dropout={self.dropout_p:g}{''.join(f', {name}' for name in self._factor_names[2:])}"
            f"{merged}{named}"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a layer whose class was made at run time by what it was made of."""
        kind = type(self)
        if kind.__module__ != __name__ or kind.__qualname__ == AdaptedLayer.__qualname__:
            return super().__reduce_ex__(protocol)
        variant = next(base for base in kind.__bases__ if issubclass(base, AdaptedLayer))
        return _rebuild, (variant, kind.base_class), self.__getstate__()


_made: dict[tuple[type[AdaptedLayer], type[nn.Module]], type[AdaptedLayer]] = {}


def variant_of(variant: type[AdaptedLayer], base: type[nn.Module]) -> type[AdaptedLayer]:
    """Return the class of a layer of class ``base`` under ``variant``.

    Where the variant is itself a subclass of the base, that is the variant. Where it stands in for
    several classes, or for one that cannot be imported here, it is a class made of both.
    """
    if issubclass(variant, base):
        return variant
    if (variant, base) not in _made:
        name = f"LoRA{base.__name__}"
        # It is a subclass of the base to all who ask.
        _made[variant, base] = type(
            name, (variant, base), {"base_class": base, "__module__": __name__}
        )
    return _made[variant, base]


def _rebuild(variant: type[AdaptedLayer], base: type[nn.Module]) -> AdaptedLayer:
    kind = variant_of(variant, base)
    return kind.__new__(kind)
