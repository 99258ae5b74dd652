"""Several adapters on one layer, under names, and which of them work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters.branches import Branch
from gauge_ext.adapters.merging import accumulation_dtype
from gauge_ext.adapters.parts import AdapterParts
from gauge_ext.adapters.rows import Apart, Rows
from gauge_ext.adapters.slot import AdapterSlot

DEFAULT = "default"


class Slots(nn.ModuleDict):
    """The further adapters of a layer by name."""


class NamedAdapters(AdapterParts):
    r"""A layer whose adapters have names and weights.

    .. math:: y = \mathrm{base}(x) + \sum_k w_k\, \Delta_k(x)

    over the active adapters k, where :math:`\mathrm{base}(x) + \Delta_k(x)` is what the layer
    computes with adapter k alone; or, while :attr:`rows` is set, each row of the batch with an
    adapter of its own.

    The first adapter has its parameters in the layer itself, so a state dict of it alone loads
    whatever stands beside it; the others have theirs in ``slots.NAME``.

    Attributes:
        own_name: Name of the first adapter.
        active: Names and weights of the active adapters; some of them may be on other layers alone.
        rows: Which adapter each row of the batch gets; None: all get the active ones.
        apart: Of a kind that stands in the place of parameters: the rows by adapters, where they
            ask for different ones.
        disabled: Whether the layer is to compute as its base.
    """

    own_name: str
    active: tuple[tuple[str, float], ...]
    rows: Rows | None = None
    apart: Apart | None = None
    disabled: bool = False
    slots: Slots

    @property
    def further(self) -> dict[str, AdapterSlot]:
        """The adapters beside the first, by name."""
        slots = self._modules.get("slots")
        # The plain dict inside, as ModuleDict looks each name up by a method in Python.
        return {} if slots is None else cast("dict[str, AdapterSlot]", slots._modules)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this layer's adapters."""
        return (self.own_name, *self.further)

    def adapter(self, name: str) -> AdapterSlot:
        """Return what holds the parameters, ``scaling`` and ``dropout_p`` of an adapter."""
        return self if name == self.own_name else self.further[name]

    def put_beside(self, name: str, slot: AdapterSlot) -> None:
        """Take a slot as a further adapter, which is not active yet."""
        if "slots" not in self._modules:
            self.slots = Slots()
        self.slots[name] = slot.train(self.training)

    def remove(self, name: str) -> None:
        """Drop one of several adapters; where it was the first, the next takes its place."""
        if name == self.own_name:
            name = next(iter(self.further))
            self.take(self.further[name])
            self.own_name = name
        del self.slots[name]
        if not self.slots:
            del self.slots
        self.settle()

    def rename(self, old: str, new: str) -> None:
        """Call an adapter otherwise; its parameters stay the same objects."""
        if old == self.own_name:
            self.own_name = new
        elif old in self.further:
            self.slots = Slots({new if k == old else k: slot for k, slot in self.further.items()})
        self.set_active(tuple((new if name == old else name, w) for name, w in self.active))

    def set_active(self, active: Sequence[tuple[str, float]]) -> None:
        """Choose the active adapters by name and weight."""
        self.active = tuple(active)
        self.settle()

    def set_rows(self, rows: Rows | None) -> None:
        """Give each row of the batches to come an adapter of its own, or no longer."""
        self.rows = rows
        self.settle()

    def set_disabled(self, disabled: bool) -> None:
        """Compute as the base, or no longer."""
        self.disabled = disabled
        self.settle()

    def settle(self) -> None:
        """Say anew in has_branch and is_plain what forward has to do."""
        working = self.present() if self.rows is None else self.rows.names
        self.has_branch = not (self.merged or self.disabled) and bool(working)
        self.is_plain = self.rows is None and self._is_plain()

    def _is_plain(self) -> bool:
        return self.has_two_factors and self.present() == [(self, 1.0)]

    def present(self) -> list[tuple[AdapterSlot, float]]:
        """Return the active adapters that this layer has, with their weights."""
        return [(self.adapter(name), w) for name, w in self.active if name in self.names]

    def sole(self) -> AdapterSlot | None:
        """Return the one adapter that works, with weight 1, or None where it is otherwise."""
        present = self.present()
        return present[0][0] if len(present) == 1 and present[0][1] == 1.0 else None

    def branch(self, slot: AdapterSlot, weight: float = 1.0, gain: Tensor | None = None) -> Branch:
        """Return the branch of one adapter, with DoRA's gain, where one is given, in its B."""
        a, b = slot.factors()
        shift: Tensor | None = slot.branch_bias
        if gain is not None:
            b = (b * gain.view(-1, *(1,) * (b.dim() - 1))).to(b.dtype)
            shift = None if shift is None else (shift * gain).to(b.dtype)
        dropout_p = slot.dropout_p if self.training else 0.0
        return Branch(a, b, slot.scaling * weight, dropout_p, shift)

    def working(self) -> tuple[list[Branch], Tensor | None]:
        r"""Return what ``forward`` adds to the base, and by what it scales it first.

        With DoRA's gains :math:`g_k` the sum of the class is

        .. math:: G \circ W x + \sum_k w_k s_k (g_k \circ B_k) A_k x, \qquad
            G = 1 + \sum_k w_k (g_k - 1)

        Returns:
            A branch for each probability of dropout, in which the adapters that share it, and its
            mask, lie side by side; and G, ``(out,)``, or None where no active adapter is a DoRA.
        """
        total, rest = None, 1.0
        found: dict[float, list[Branch]] = {}
        for slot, weight in self.present():
            gain = self.gain(slot) if slot.has_magnitude else None
            branch = self.branch(slot, weight, gain)
            found.setdefault(branch.dropout_p, []).append(branch)
            if gain is not None:
                part = gain if weight == 1.0 else weight * gain
                total, rest = part if total is None else total + part, rest - weight
        if total is not None and rest:
            total = total + rest
        return [self._joined(branches) for branches in found.values()], total

    def _joined(self, branches: Sequence[Branch]) -> Branch:
        """Branches of one dropout as one, whose scales are in B."""
        if len(branches) == 1:
            return branches[0]
        pairs = [(branch.lora_A, branch.lora_B * branch.scaling) for branch in branches]
        shifts = [b.bias * b.scaling for b in branches if b.bias is not None]
        shift = sum(shifts[1:], shifts[0]) if shifts else None
        return Branch(*self.side_by_side(pairs), 1.0, branches[0].dropout_p, shift)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what training changes of all adapters, by the names in the module."""
        found = self.trained()
        for name, slot in self.further.items():
            found |= {f"slots.{name}.{key}": value for key, value in slot.trained().items()}
        return found

    @torch.no_grad()
    def summed_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A, B and s of the sum of the active adapters, without DoRA's gain."""
        present = self.present()
        if not present:
            a, b = self.factors()
            return a[:0], b[:, :0], 1.0
        if len(present) == 1:
            ((slot, weight),) = present
            return *slot.factors(), slot.scaling * weight
        factors = [slot.factors() for slot, _ in present]
        wide = accumulation_dtype(
            self.base_weight.dtype, *(t.dtype for pair in factors for t in pair)
        )
        # The scales go into B in a dtype in which they lose nothing to speak of.
        pairs = [
            (a.to(wide), b.to(wide) * (slot.scaling * weight))
            for (slot, weight), (a, b) in zip(present, factors, strict=True)
        ]
        return *self.side_by_side(pairs), 1.0

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ``scaling * lora_B @ lora_A`` in the layout of the weight, of all active adapters.

        It is accumulated in float32, or in float64 where the base or a factor is float64, and has
        that dtype. DoRA's gain is not in it.
        """
        a, b, scaling = self.summed_factors()
        dtype = accumulation_dtype(a.dtype, b.dtype, self.base_weight.dtype)
        if not a.shape[0]:
            return torch.zeros_like(self.mergeable_weight(), dtype=dtype)
        return self.product(b.to(dtype), a.to(dtype)).mul_(scaling)

    def __getstate__(self) -> Any:
        # Rows are of one batch, not of the layer.
        # torch has no types for it.
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state.pop("apart", None)
        if state.pop("rows", None) is not None:
            state["is_plain"] = self._is_plain()
            state["has_branch"] = not (self.merged or self.disabled) and bool(self.present())
        return state

    def forget_names(self) -> None:
        """Drop all adapters but the first, and everything that names need."""
        for name in ("own_name", "active", "rows", "apart", "disabled"):
            vars(self).pop(name, None)
        self._modules.pop("slots", None)
