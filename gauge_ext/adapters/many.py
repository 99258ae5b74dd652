"""A linear layer that carries several adapters under names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters.lora import LoRALinear
from gauge_ext.adapters.merging import accumulation_dtype, adapter_dtype
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.errors import AdapterStateError

_ATTRIBUTES = ("slots", "own_name", "active", "rows")


class AdapterSlot(nn.Module):
    """One of the further adapters of a layer.

    Attributes:
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scaling: s.
        dropout_p: p.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout_p: float

    def __init__(
        self, lora_A: nn.Parameter, lora_B: nn.Parameter, scaling: float, dropout_p: float
    ) -> None:
        super().__init__()
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.scaling = scaling
        self.dropout_p = dropout_p


class ManyLoRALinear(LoRALinear):
    r"""A :class:`LoRALinear` with several adapters, some of them active, each with a weight.

    .. math:: y = x W^T + b + \sum_k w_k s_k\, x A_k^T B_k^T

    or, while :attr:`rows` is set, a different adapter for each row, see
    :func:`gauge_ext.ops.lora_gather`.
    The first adapter keeps its place in ``lora_A`` and ``lora_B``, so that a state dict of it alone
    still loads; the others lie in ``slots.NAME.lora_A`` and ``slots.NAME.lora_B``. A layer becomes
    one by :meth:`adopt`, which exchanges its class; a single adapter does not pay for this.

    Attributes:
        own_name: Name of the adapter in ``lora_A`` and ``lora_B``.
        slots: The others by name.
        active: Names and weights of the adapters that ``forward`` adds.
        rows: Names of adapters of this layer and ``index``, which of them each row gets; or None.
    """

    slots: nn.ModuleDict
    own_name: str
    active: tuple[tuple[str, float], ...]
    rows: tuple[tuple[str, ...], Tensor] | None

    @classmethod
    def adopt(cls, layer: LoRALinear, name: str) -> ManyLoRALinear:
        """Turn ``layer`` itself into one whose present adapter is called ``name``."""
        if isinstance(layer, ManyLoRALinear):
            return layer
        many = cast("ManyLoRALinear", layer)
        layer.__class__ = cls
        many.slots = nn.ModuleDict()
        many.own_name = name
        many.active = ((name, 1.0),)
        many.rows = None
        return many

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this layer's adapters."""
        return (self.own_name, *self.slots)

    def adapter(self, name: str) -> LoRALinear | AdapterSlot:
        """Return what holds ``lora_A``, ``lora_B``, ``scaling`` and ``dropout_p`` of an adapter."""
        return self if name == self.own_name else cast("AdapterSlot", self.slots[name])

    def add(self, name: str, spec: AdapterSpec) -> None:
        """Put a fresh adapter beside the others; it is not active yet."""
        weight = self.base_weight
        dtype = adapter_dtype(weight.dtype) if spec.dtype is None else spec.dtype
        a, b = (
            torch.empty(shape, dtype=dtype, device=weight.device)
            for shape in self.factor_shapes(self, spec.rank)
        )
        self.start_factors(a, b, spec)
        self.slots[name] = AdapterSlot(
            nn.Parameter(a), nn.Parameter(b), float(spec.scaling), float(spec.dropout)
        )

    def remove(self, name: str) -> None:
        """Drop one of several adapters; where it was the first, the next takes its place."""
        if name == self.own_name:
            self.own_name = next(iter(self.slots))
            heir = cast("AdapterSlot", self.slots[self.own_name])
            self.lora_A, self.lora_B = heir.lora_A, heir.lora_B
            self.scaling, self.dropout_p = heir.scaling, heir.dropout_p
            name = self.own_name
        del self.slots[name]

    def rename(self, old: str, new: str) -> None:
        """Call an adapter otherwise; its parameters stay the same objects."""
        if old == self.own_name:
            self.own_name = new
        else:
            kept = {new if name == old else name: slot for name, slot in self.slots.items()}
            self.slots = nn.ModuleDict(kept)
        self.active = tuple((new if name == old else name, w) for name, w in self.active)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output with the active adapters, or with each row's own.

        Raises:
            AdapterStateError: Training with dropout, where each row has an adapter of its own or
                the active adapters differ in it.
        """
        if not self.has_branch:
            return F.linear(input, self.weight, self.bias)
        if self.rows is not None:
            return self._by_rows(input, *self.rows)
        chosen = [(self.adapter(name), weight) for name, weight in self.present()]
        if not chosen:
            return F.linear(input, self.weight, self.bias)
        dropout_p, seed = self._dropout([adapter for adapter, _ in chosen]), None
        if dropout_p > 0.0:
            seed = ops.draw_seed()
        a: Tensor
        b: Tensor
        if len(chosen) == 1:
            ((adapter, weight),) = chosen
            a, b, scaling = adapter.lora_A, adapter.lora_B, adapter.scaling * weight
        else:
            # Side by side they are one adapter, of the sum of the ranks.
            a = torch.cat([adapter.lora_A for adapter, _ in chosen])
            b = torch.cat([adapter.lora_B * (adapter.scaling * w) for adapter, w in chosen], 1)
            scaling = 1.0
        return ops.lora_linear(input, self.weight, self.bias, a, b, scaling, dropout_p, seed)

    def _by_rows(self, input: Tensor, names: tuple[str, ...], index: Tensor) -> Tensor:
        adapters = [self.adapter(name) for name in names]
        if self.training and any(adapter.dropout_p > 0.0 for adapter in adapters):
            raise AdapterStateError(
                "a different adapter for each row has no dropout in training.",
                hint="Call model.eval(), or attach the adapters with dropout=0.",
            )
        return ops.lora_gather(
            input,
            self.weight,
            self.bias,
            [adapter.lora_A for adapter in adapters],
            [adapter.lora_B for adapter in adapters],
            [adapter.scaling for adapter in adapters],
            index,
        )

    def present(self) -> list[tuple[str, float]]:
        """Return the names and weights of the active adapters that this layer has."""
        return [(name, w) for name, w in self.active if name == self.own_name or name in self.slots]

    def _dropout(self, adapters: Iterable[LoRALinear | AdapterSlot]) -> float:
        if not self.training:
            return 0.0
        found = {adapter.dropout_p for adapter in adapters}
        if len(found) > 1:
            raise AdapterStateError(
                f"the active adapters differ in dropout, {sorted(found)}, and share one mask.",
                hint="Train them one at a time, or attach them with the same dropout.",
            )
        return found.pop()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the factors of all adapters, by their names in the module."""
        others = {f"slots.{name}": parameter for name, parameter in self.slots.named_parameters()}
        return {**super().adapter_parameters(), **others}

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return the factors of the first adapter."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.no_grad()
    def summed_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the active adapters side by side, as one of the sum of their ranks."""
        chosen = [(self.adapter(name), weight) for name, weight in self.present()]
        if not chosen:
            return self.lora_A[:0], self.lora_B[:, :0], 1.0
        if len(chosen) == 1:
            ((adapter, weight),) = chosen
            return adapter.lora_A, adapter.lora_B, adapter.scaling * weight
        dtypes = [p.dtype for adapter, _ in chosen for p in (adapter.lora_A, adapter.lora_B)]
        wide = accumulation_dtype(self.weight.dtype, *dtypes)
        a = torch.cat([adapter.lora_A.to(wide) for adapter, _ in chosen])
        # The scales go into B in a dtype in which they lose nothing to speak of.
        b = [adapter.lora_B.to(wide) * (adapter.scaling * weight) for adapter, weight in chosen]
        return a, torch.cat(b, 1), 1.0

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the sum of the active adapters' updates, each times its weight."""
        a, b, scaling = self.summed_factors()
        dtype = accumulation_dtype(self.weight.dtype, a.dtype, b.dtype)
        return torch.mm(b.to(dtype), a.to(dtype)).mul_(scaling)

    def to_base(self) -> nn.Module:
        """Drop all adapters and be a plain layer again, with the weight of the moment."""
        for name in _ATTRIBUTES:
            delattr(self, name)
        return super().to_base()

    def extra_repr(self) -> str:
        """Say what one with a single adapter says, and the names."""
        shown = ", ".join(f"{name} x {weight:g}" for name, weight in self.active)
        return f"{super().extra_repr()}, adapters={list(self.names)}, active=[{shown}]"

    def __getstate__(self) -> Any:
        # Rows are of one batch, not of the layer.
        return {**super().__getstate__(), "rows": None}
