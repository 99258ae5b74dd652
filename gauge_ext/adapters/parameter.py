"""An adapter on one bare parameter of a module, such as the stacked weights of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gauge_ext.adapters import inits
from gauge_ext.adapters.dtypes import FLOAT_DTYPES
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.low_rank_sum import LowRankSum
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.adapters.whole import WholeModule
from gauge_ext.errors import TargetError

if TYPE_CHECKING:
    from gauge_ext.adapters.tokens import TrainedTokens

# The adapter on the parameter `down_proj` is the submodule `lora_down_proj` of its holder.
CHILD = "lora_"


class LoRAParameter(AdaptedLayer):
    r"""A low-rank update of each matrix in a parameter W ``(E, out, in)``.

    .. math:: W_e + s\,B_e A_e, \qquad e = 1 \ldots E

    with ``lora_A`` ``(r E, in)``, one expert after the other, and ``lora_B`` ``(out, r E)``, in
    which the E columns of one direction lie together: PEFT's layout for ``target_parameters``. A
    matrix W ``(out, in)`` counts as E = 1. Where the holder says ``is_transposed``, as Llama 4's
    experts do, W is ``(E, in, out)`` and so is the update, :math:`A_e^T B_e^T`.

    It is a submodule of the module that holds W, its ``owner``, whose forward it does not know:
    while that runs, something else stands in W's place. For a stack of matrices that is a
    :class:`~gauge_ext.adapters.low_rank_sum.LowRankSum`, of which products are taken by the
    factors. For a single matrix, and under ``torch.compile`` and ``torch.export``, it is the sum,
    of W's dtype: beside a bfloat16 W a small update is rounded like a merged one, as in PEFT.
    There is no dropout, of which there would have to be an input.
    """

    kind: ClassVar[Kind] = "parameter"
    rows_refusal = "a bare parameter is one for all rows of a batch, as in PEFT"

    def __init__(
        self, owner: nn.Module, name: str, spec: AdapterSpec, called: str = DEFAULT
    ) -> None:
        super().__init__()
        # In a tuple, so that the owner does not become a submodule of its own submodule.
        self._owner = (owner,)
        self.weight_name = name
        self._add_adapter(spec, called)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self._owner[0]

    @property
    def base_weight(self) -> Tensor:
        """W itself, also while something stands in its place."""
        return cast("Tensor", self.owner._parameters[self.weight_name])

    @property
    def experts(self) -> int:
        """E."""
        weight = self.base_weight
        return weight.shape[0] if weight.dim() == 3 else 1

    @property
    def blocks(self) -> int:
        """E: each expert has r rows of lora_A."""
        return self.experts

    def rank_of(self, slot: AdapterSlot) -> int:
        """Return r, the rank of one expert's update."""
        return slot.lora_A.shape[0] // self.experts

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        if spec.dropout:
            return f"dropout ({spec.dropout}) is on inputs, and a bare parameter has none"
        for field in ("use_dora", "lora_bias"):
            if getattr(spec, field):
                return f"a bare parameter takes plain adapters only, without {field}, as in PEFT"
        return super().reason_against_spec(module, spec)

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank * E, in)`` and ``(out, rank * E)``."""
        weight = module.base_weight
        experts = weight.shape[0] if weight.dim() == 3 else 1
        out, size = weight.shape[-2:]
        if module.is_transposed:
            out, size = size, out
        return (rank * experts, size), (out, rank * experts)

    def start_factors(self, lora_A: Tensor, lora_B: Tensor, spec: AdapterSpec) -> None:
        """Fill fresh factors; each expert's start as a linear layer's of rank r."""
        for a in lora_A.view(self.experts, spec.rank, -1):
            inits.start(a, lora_B, spec.init, self.base_weight, spec.scaling)

    @property
    def is_transposed(self) -> bool:
        """Whether the matrices of the weight are ``(in, out)``; only stacked ones can be."""
        return self.base_weight.dim() == 3 and bool(getattr(self.owner, "is_transposed", False))

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``B_e A_e`` of every expert, in the layout of the weight."""
        left, right = self._stacks(lora_B, lora_A)
        return torch.bmm(left, right).view(self.base_weight.shape)

    def _stacks(self, lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        """Two stacks of E matrices whose products are the updates of the weight's."""
        a = lora_A.unflatten(0, (self.experts, -1))
        b = lora_B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return (a.mT, b.mT) if self.is_transposed else (b, a)

    def adapted(self) -> Tensor:
        """Return ``W + s B A``, of W's shape and dtype, differentiable in the factors."""
        weight = self.base_weight
        (branch,), _ = self.working()  # one, as there is no dropout
        left, right = self._stacks(branch.lora_B.to(weight.dtype), branch.lora_A.to(weight.dtype))
        stack = weight if weight.dim() == 3 else weight.unsqueeze(0)
        # Autocast would give a sum of another dtype than the parameter that it stands for.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(stack, left, right, alpha=branch.scaling).view(weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what stands for W: see the class; W where it is merged, or the branch is off."""
        weight = self.base_weight
        if not self.has_branch:
            return weight
        # What traces programs would see the stand-in, and not what it does. A weight of another
        # class (distributed, quantised) knows best itself how it is multiplied.
        known = type(weight) in (nn.Parameter, Tensor)
        if weight.dim() != 3 or not known or torch.compiler.is_compiling():
            return self.adapted()
        (branch,), _ = self.working()
        stacks = self._stacks(branch.lora_B, branch.lora_A)
        return LowRankSum(weight, *stacks, branch.scaling)

    def to_base(self) -> nn.Module:
        """Take the adapter off its owner, with the weight of the moment, and return the owner."""
        owner = self.owner
        del owner._modules[CHILD + self.weight_name]
        leave_holder(owner)
        return owner

    def extra_repr(self) -> str:
        """Say the parameter, its shape, and what every adapted layer says."""
        return f"{self.weight_name} {tuple(self.base_weight.shape)}, {super().extra_repr()}"


class LoRAHolder(nn.Module):
    """A module of which some parameters have a :class:`LoRAParameter`.

    It becomes one by the exchange of its class; its parameters keep their names, and are not
    written to.
    """

    held_class: ClassVar[type[nn.Module]]

    def parameter_adapters(self) -> dict[str, AdaptedLayer]:
        """Return its adapters by the names of the parameters, with those of tied ones."""
        children = [m for m in self._modules.values() if isinstance(m, LoRAParameter)]
        tied: tuple[AdaptedLayer, ...] = vars(self).get("_tied", ())
        return {child.weight_name: child for child in (*children, *tied)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns with ``W + s B A`` in the place of W."""
        adapters = self.parameter_adapters().items()
        adapted = {name: m() for name, m in adapters if m.has_branch and m.apart is None}
        tokens: tuple[TrainedTokens, ...] = vars(self).get("_tied", ())
        for rows in tokens:
            if rows.apart is not None:
                return rows.call_by_rows(self, adapted, args, kwargs)
        return self.forward_with(adapted, *args, **kwargs)

    def forward_with(self, adapted: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns with these in the place of its parameters."""
        there = vars(self)
        # An attribute of the object is found before a registered parameter of that name.
        there.update(adapted)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in adapted:
                del there[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a module whose class was made at run time by what it was made of."""
        # torch has no types for __getstate__.
        # torch has no types for __getstate__().
        return _rebuild, (type(self).held_class,), self.__getstate__()  # type: ignore[no-untyped-call]


class ReadHolder(LoRAHolder):
    """A module whose ``weight`` is read from outside, and that is never called.

    Such is the output projection of ``nn.MultiheadAttention``: who reads its weight gets the sum.
    """

    @property
    def weight(self) -> Tensor:
        """``W + s B A``; W itself where it has no adapter, or its branch is off."""
        adapter = self.parameter_adapters().get("weight")
        return cast("Tensor", self._parameters["weight"] if adapter is None else adapter())


_made: dict[type[nn.Module], type[LoRAHolder]] = {}


def _holder_class(held: type[nn.Module]) -> type[LoRAHolder]:
    if held not in _made:
        read = issubclass(held, NonDynamicallyQuantizableLinear)
        bases = (ReadHolder if read else LoRAHolder, held)
        members = {"held_class": held, "__module__": __name__}
        _made[held] = type(f"LoRA{held.__name__}", bases, members)
    return _made[held]


def become_holder(module: nn.Module) -> None:
    """Make a module one whose forward reads adapted parameters."""
    if not isinstance(module, LoRAHolder):
        module.__class__ = _holder_class(type(module))


def leave_holder(module: nn.Module) -> None:
    """Give a module its own class back once it has no adapters."""
    if isinstance(module, LoRAHolder) and not module.parameter_adapters():
        cast("nn.Module", module).__class__ = type(module).held_class


def _rebuild(held: type[nn.Module]) -> LoRAHolder:
    kind = _holder_class(held)
    return kind.__new__(kind)


def reason_against_parameter(owner: nn.Module, name: str) -> str | None:
    """Say why the parameter ``name`` of ``owner`` cannot carry an adapter, or return None."""
    if isinstance(owner, AdaptedLayer):
        return "the module that holds it has an adapter itself"
    if isinstance(owner, WholeModule):
        return f"{', '.join(map(repr, owner.names))} has its module trained whole (modules_to_save)"
    if "forward" in vars(owner):
        return "the forward of its module was replaced on the object (by hooks, perhaps)"
    weight = owner._parameters.get(name)
    if weight is None:
        return "it is not a plain parameter (reparametrised or pruned)"
    if weight.dtype not in FLOAT_DTYPES:
        return f"it is {weight.dtype}, and only floating-point weights are supported"
    if weight.dim() not in (2, 3):
        return f"it must have the shape (out, in) or (experts, out, in), got {tuple(weight.shape)}"
    if hasattr(owner, CHILD + name) and name not in getattr(owner, "parameter_adapters", dict)():
        return f"its module has something called {CHILD + name} already"
    return None


def adapt_parameter(
    owner: nn.Module, name: str, spec: AdapterSpec, called: str = DEFAULT
) -> LoRAParameter:
    """Put an adapter, ``called`` so, on the parameter ``name`` of ``owner`` itself and return it.

    Raises:
        TargetError: The parameter cannot carry this adapter.
    """
    reason = reason_against_parameter(owner, name) or LoRAParameter.reason_against_spec(owner, spec)
    if reason:
        raise TargetError(f"an adapter cannot be put on the parameter {name}: {reason}.")
    adapter = LoRAParameter(owner, name, spec, called)
    become_holder(owner)
    owner.add_module(CHILD + name, adapter.train(owner.training))
    return adapter
