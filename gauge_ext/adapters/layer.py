"""What all layers have in common that carry an adapter in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from gauge_ext import ops
from gauge_ext.adapters import dora, inits
from gauge_ext.adapters.dtypes import FLOAT_DTYPES
from gauge_ext.adapters.merging import accumulation_dtype, adapter_dtype, add_product, add_update
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.errors import AdapterStateError, TargetError

_ATTRIBUTES = (
    *("scaling", "dropout_p", "merged", "is_plain"),
    *("_kept", "_factor_names", "_start_names"),
)


class AdaptedLayer(nn.Module):
    r"""A layer of torch with a low-rank adapter beside one frozen weight.

    A layer becomes adapted by :meth:`adapt`, which exchanges its class in place: identity, hooks
    and the names of its parameters stay, and beside them come ``lora_A`` and ``lora_B``. Each kind
    of layer is one subclass in a file of its own, with one line in
    :mod:`gauge_ext.adapters.registry`. It says by the class attributes which classes of torch it
    stands in for and which weight it adapts, and defines ``forward``, :meth:`factor_shapes` and,
    where the update is not the matrix :math:`s\,B A`, :meth:`product`.

    Attributes:
        bases: The classes that it stands in for; exactly these, since a subclass may compute
            something else.
        weight_name: The parameter that it adapts.
        kind: See :class:`~gauge_ext.adapters.protocol.Adapter`.
        is_linear: Whether "all-linear" means it.
        output_axis: The axis of the weight that runs over the outputs.
        companions: Paths of layers inside it that are adapted along with it.
        base_class: The class that the layer had before and will have again.
        scaling: s, applied to the product of the factors.
        dropout_p: The probability with which training drops an input of the branch.
        merged: Whether the weight holds the update, so that ``forward`` leaves the branch out.
        is_plain: Whether there is nothing but lora_A and lora_B: no magnitude (``lora_magnitude``,
            DoRA) and no bias of the branch (``lora_bias``).
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = ()
    weight_name: str = "weight"
    kind: ClassVar[Kind] = "linear"
    is_linear: ClassVar[bool] = False
    output_axis: ClassVar[int] = 0
    companions: ClassVar[tuple[str, ...]] = ()
    base_class: ClassVar[type[nn.Module]]

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter
    lora_B0: nn.Parameter
    lora_magnitude: nn.Parameter
    lora_bias: nn.Parameter
    scaling: float
    dropout_p: float
    merged: bool
    is_plain: bool
    _factor_names: tuple[str, ...]
    _start_names: tuple[str, ...]
    # The base's own Parameters while merged, if they were kept, by name; None where it had none.
    _kept: dict[str, nn.Parameter | None]

    @classmethod
    def adapt(cls, module: nn.Module, spec: AdapterSpec) -> Self:
        """Turn ``module`` itself into an adapted layer and return it.

        Args:
            module: A layer for which :meth:`reason_against` is None.
            spec: Rank, scaling and the like.

        Raises:
            TargetError: The layer cannot carry this adapter.
        """
        if reason := cls.reason_against(module) or cls.reason_against_spec(module, spec):
            raise TargetError(f"an adapter cannot be put on this layer: {reason}.")
        before = type(module)
        layer = cast("Self", module)
        module.__class__ = variant_of(cls, before)
        try:
            layer._add_adapter(spec)
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

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of lora_A and lora_B of a rank on ``module``, adapted or not."""
        raise NotImplementedError

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``B A`` in the layout of the weight."""
        return torch.mm(lora_B, lora_A)

    def _add_adapter(self, spec: AdapterSpec) -> None:
        weight = self.base_weight
        dtype = adapter_dtype(weight.dtype) if spec.dtype is None else spec.dtype
        shape_A, shape_B = self.factor_shapes(self, spec.rank)
        a = torch.empty(shape_A, dtype=dtype, device=weight.device)
        b = torch.empty(shape_B, dtype=dtype, device=weight.device)
        self.start_factors(a, b, spec)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scaling = float(spec.scaling)
        self.dropout_p = float(spec.dropout)
        self.merged = False
        self._kept = {}
        self._factor_names = ("lora_A", "lora_B")
        self._start_names = ()
        if inits.starts_nonzero(spec.init):
            self._keep_start()
        if spec.use_dora:
            norms = dora.row_norms(*self.matrices(), self.scaling)
            magnitude = norms.to(dtype).reshape(self.magnitude_shape())
            self.lora_magnitude = nn.Parameter(magnitude)
            self._factor_names += ("lora_magnitude",)
        if spec.lora_bias:
            outputs = weight.shape[self.output_axis]
            self.lora_bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=weight.device))
            self._factor_names += ("lora_bias",)
        self.is_plain = len(self._factor_names) == 2 and not self._start_names

    def _keep_start(self) -> None:
        """Make the factors of now the constant start, from which the update counts."""
        self.lora_A0 = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.lora_B0 = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)
        self._start_names = ("lora_A0", "lora_B0")

    @torch.no_grad()
    def start_at(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Start a linear layer's factors at values whose product then counts as zero.

        Args:
            lora_A: ``(r, in)``.
            lora_B: ``(out, r)``.
        """
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        self._keep_start()
        self.is_plain = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the update ``s B A``: with a start, ``[A; A0]`` and ``[B, -B0]``."""
        if not self._start_names:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], 1)

    def summed_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A, B and s of everything that a merge adds."""
        return *self.factors(), self.scaling

    def start_factors(self, lora_A: Tensor, lora_B: Tensor, spec: AdapterSpec) -> None:
        """Fill fresh factors; where the layer is not linear, such that their product is zero."""
        inits.start(lora_A, lora_B, spec.init, self._start_weight(), spec.scaling)

    def _start_weight(self) -> Tensor:
        """The weight as ``(out, in)``, for starts that depend on it."""
        weight = self.base_weight
        return weight.mT if self.output_axis and weight.dim() == 2 else weight

    @property
    def owner(self) -> nn.Module:
        """The module whose parameter the adapted weight is."""
        return self

    @property
    def base_weight(self) -> Tensor:
        """The adapted weight: the base's own, or the merged one."""
        return cast("Tensor", getattr(self.owner, self.weight_name))

    def magnitude_shape(self) -> tuple[int, ...]:
        """Return the shape of lora_magnitude in a file."""
        return (self.base_weight.shape[self.output_axis],)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight ``(out, in)``, A ``(r, in)`` and B ``(out, r)``."""
        return self.base_weight, *self.factors()

    def mergeable_weight(self) -> Tensor:
        """Return the weight in the layout of :meth:`delta_weight`."""
        return self.base_weight

    @property
    def has_magnitude(self) -> bool:
        """Whether the adapter is a DoRA."""
        return "lora_magnitude" in self._factor_names

    @property
    def branch_bias(self) -> nn.Parameter | None:
        """The bias that is added to B A x before the scaling, if there is one."""
        return self.lora_bias if "lora_bias" in self._factor_names else None

    def gain(self) -> Tensor:
        """Return by how much DoRA scales each output, ``(out,)``; the norms are constants."""
        return dora.gain(self.lora_magnitude, dora.row_norms(*self.matrices(), self.scaling))

    @property
    def rank(self) -> int:
        """The number of rows of lora_A."""
        return self.lora_A.shape[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what training changes, by name."""
        return {name: getattr(self, name) for name in self._factor_names}

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return what is saved of the layer, by the names of the :class:`Adapter` protocol.

        An update that counts from a start is saved as one of twice the rank.
        """
        lora_A, lora_B = self.factors()
        return {**self.adapter_parameters(), "lora_A": lora_A, "lora_B": lora_B}

    def own_names(self) -> tuple[str, ...]:
        """Return the names of all parameters that are the adapter's, trained or constant."""
        return self._factor_names + self._start_names

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ``scaling * lora_B @ lora_A`` in the layout of the weight.

        It is accumulated in float32, or in float64 where the base or a factor is float64, and has
        that dtype.
        """
        a, b = self.factors()
        dtype = accumulation_dtype(a.dtype, b.dtype, self.base_weight.dtype)
        return self.product(b.to(dtype), a.to(dtype)).mul_(self.scaling)

    @torch.no_grad()
    def merged_weight(self, *, safe: bool = True) -> Tensor:
        """Return ``W + scaling * lora_B @ lora_A`` in W's dtype, rounded to it once.

        Of a DoRA its rows are scaled to the magnitude, before the rounding.

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            NonFiniteError: The base, a factor or the sum holds NaN or infinity.
            AdapterStateError: The layer is merged already.
        """
        return self.merged_parameters(safe=safe)[self.weight_name]

    @torch.no_grad()
    def merged_parameters(self, *, safe: bool = True) -> dict[str, Tensor]:
        """Return every parameter of the base that a merge changes, by name: see merged_weight().

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            NonFiniteError: See :meth:`merged_weight`.
            AdapterStateError: The layer is merged already.
        """
        if self.merged:
            raise AdapterStateError("the layer is merged already.", hint="Call unmerge() first.")
        parts = {self.weight_name: self.base_weight, **self.adapter_parameters()}
        magnitude = self.lora_magnitude if self.has_magnitude else None

        def finish(total: Tensor) -> Tensor:
            return total if magnitude is None else dora.rescale(total, magnitude, self.output_axis)

        weight, (a, b, scaling) = self.mergeable_weight(), self.summed_factors()
        if magnitude is None and ops.merges_in_one_pass(weight, a, b):
            flip = self.output_axis == 1
            new = add_product(weight, a, b, scaling, parts, transposed=flip, safe=safe)
        else:
            new = add_update(weight, self.delta_weight(), parts, safe=safe, finish=finish)
        merged = {self.weight_name: new}
        if (shift := self.branch_bias) is not None:
            wide = accumulation_dtype(shift.dtype, weight.dtype)
            update = shift.to(wide) * self.scaling
            if magnitude is not None:
                update *= self.gain()
            bias = getattr(self, "bias", None)
            bias = torch.zeros_like(update, dtype=weight.dtype) if bias is None else bias
            merged["bias"] = add_update(bias, update, {"bias": bias, "lora_bias": shift}, safe=safe)
        return merged

    def merge(self, *, safe: bool = True, keep_base: bool = True) -> None:
        """Put the update into the weight, as a new Parameter.

        The old Parameter is never written to: tied weights and whoever else holds it stay as they
        are, and :meth:`unmerge` gives back the very same object, bit for bit.

        Args:
            safe: Refuse NaN and infinity, with nothing changed.
            keep_base: Keep the old Parameter for :meth:`unmerge`, at the price of its memory.

        Raises:
            NonFiniteError: See :meth:`merged_weight`.
            AdapterStateError: The layer is merged already.
        """
        self.adopt_merged(self.merged_parameters(safe=safe), keep_base=keep_base)

    def adopt_merged(self, merged: Mapping[str, Tensor], *, keep_base: bool) -> None:
        """Make ``merged``, a result of :meth:`merged_parameters`, the layer's own."""
        kept: dict[str, nn.Parameter | None] = {}
        for name, value in merged.items():
            base = kept[name] = cast("nn.Parameter | None", getattr(self.owner, name))
            trained = base is not None and base.requires_grad
            setattr(self.owner, name, nn.Parameter(value, requires_grad=trained))
        self._kept = kept if keep_base else {}
        self.merged = True

    def unmerge(self) -> None:
        """Put the base's own Parameters back.

        Raises:
            AdapterStateError: The layer is not merged, or its base was not kept.
        """
        if not self.can_unmerge:
            state = "was merged with keep_base=False" if self.merged else "is not merged"
            raise AdapterStateError(f"the layer {state}, so it cannot be unmerged.")
        for name, base in self._kept.items():
            setattr(self.owner, name, base)
        self._kept = {}
        self.merged = False

    @property
    def can_unmerge(self) -> bool:
        """Whether the layer is merged and its base was kept."""
        return self.merged and bool(self._kept)

    @property
    def kept_parameters(self) -> Mapping[str, nn.Parameter]:
        """The base's own Parameters while merged, by name; empty if they were not kept."""
        return {name: base for name, base in self._kept.items() if base is not None}

    def to_base(self) -> nn.Module:
        """Drop the adapter and be a plain layer again, with the weight of the moment."""
        for name in (*self.own_names(), *_ATTRIBUTES):
            delattr(self, name)
        base = cast("nn.Module", self)
        base.__class__ = type(self).base_class
        return base

    def extra_repr(self) -> str:
        """Say what the base says, the rank, the scaling and the dropout."""
        merged = ", merged" if self.merged else ""
        base = super().extra_repr()
        return (
            f"{base}{', ' if base else ''}rank={self.rank}, scaling={self.scaling:g}, "
            f"dropout={self.dropout_p:g}{''.join(f', {name}' for name in self._factor_names[2:])}"
            f"{merged}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Module.to() and its kin know of registered parameters only; the kept base moves along.
        for name, base in self.kept_parameters.items():
            with torch.no_grad():
                moved = fn(base)
            if moved.is_meta == base.is_meta:
                base.data = moved
            else:
                self._kept[name] = nn.Parameter(moved, requires_grad=base.requires_grad)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a layer whose class was made at run time by what it was made of."""
        kind = type(self)
        if kind.__module__ != __name__ or kind.__qualname__ == AdaptedLayer.__qualname__:
            return super().__reduce_ex__(protocol)
        variant = next(base for base in kind.__bases__ if issubclass(base, AdaptedLayer))
        return _rebuild, (variant, kind.base_class), self.__getstate__()  # type: ignore[no-untyped-call]

    # A state dict says in its metadata when a weight in it is a merged one, because loading that
    # into an adapted layer would count the update twice, without a word.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if self.merged and metadata is not None:
            metadata[prefix[:-1]]["merged"] = True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            which = "the layer" if self.merged else "the state dict"
            if self.merged or local_metadata.get("merged", False):
                error_msgs.append(
                    f"{which} at {prefix[:-1]!r} holds a merged weight; call gauge_ext.unmerge() "
                    "first, or the update would be lost or counted twice."
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


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
