"""The adapter in the weight and out of it again, and what else must know that it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from gauge_ext import ops
from gauge_ext.adapters import dora
from gauge_ext.adapters.many import NamedAdapters
from gauge_ext.adapters.merging import (
    accumulation_dtype,
    add_product,
    add_update,
    surely_finite,
)
from gauge_ext.adapters.ownership import is_held_alone
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.errors import AdapterStateError


class MergeableLayer(NamedAdapters):
    """A layer whose weight can take the update in and give the former weight back."""

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
        merged = {self.weight_name: self._summed_weight(parts, safe=safe)}
        present = self.present()
        shifts = [(s, w, s.branch_bias) for s, w in present if s.branch_bias is not None]
        if shifts:
            weight = self.base_weight
            wide = accumulation_dtype(weight.dtype, *(shift.dtype for *_, shift in shifts))
            update = torch.zeros(weight.shape[self.output_axis], dtype=wide, device=weight.device)
            for slot, w, shift in shifts:
                part = shift.to(wide) * (slot.scaling * w)
                update += part * self.gain(slot) if slot.has_magnitude else part
            bias = getattr(self, "bias", None)
            bias = torch.zeros_like(update, dtype=weight.dtype) if bias is None else bias
            merged["bias"] = add_update(bias, update, {"bias": bias, **parts}, safe=safe)
        return merged

    def _summed_weight(self, parts: Mapping[str, Tensor], *, safe: bool) -> Tensor:
        """The weight with the updates of all active adapters, each times its weight."""
        weight, present, sole = self.mergeable_weight(), self.present(), self.sole()
        if not present:
            return weight.detach().clone()
        if not any(slot.has_magnitude for slot, _ in present):
            a, b, scaling = self.summed_factors()
            if ops.merges_in_one_pass(weight, a, b):
                flip = self.output_axis == 1
                return add_product(weight, a, b, scaling, parts, transposed=flip, safe=safe)
            return add_update(weight, self.delta_weight(), parts, safe=safe)
        if sole is None:
            (slot, w), *others = present
            total = self._update_of(slot).mul_(w)
            for slot, w in others:
                total.add_(self._update_of(slot), alpha=w)
            return add_update(weight, total, parts, safe=safe)

        def finish(total: Tensor) -> Tensor:
            return dora.rescale(total, sole.lora_magnitude, self.output_axis)

        return add_update(weight, self.delta_weight(), parts, safe=safe, finish=finish)

    def _update_of(self, slot: AdapterSlot) -> Tensor:
        """What one adapter alone makes of the weight, minus the weight."""
        weight, (a, b) = self.mergeable_weight(), slot.factors()
        wide = accumulation_dtype(weight.dtype, a.dtype, b.dtype)
        update = self.product(b.to(wide), a.to(wide)).mul_(slot.scaling)
        if slot.has_magnitude:
            total = dora.rescale(update.add_(weight), slot.lora_magnitude, self.output_axis)
            update = total.sub_(weight)
        return update

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

    @torch.no_grad()
    def check_merge(self, *, safe: bool = True) -> None:
        """Raise what :meth:`merged_parameters` would, and change nothing.

        A plain adapter costs one reading of the weight, unless its bound comes near the range of
        the dtype; any other is merged, and the result thrown away.

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            NonFiniteError: See :meth:`merged_weight`.
            AdapterStateError: The layer is merged already, or its kind cannot be merged.
        """
        plain = self._adds_a_product and not self.merged
        if not plain or (safe and not surely_finite(self.base_weight, *self.summed_factors())):
            self.merged_parameters(safe=safe)

    @torch.no_grad()
    def merge_for_good(self) -> None:
        """Merge and drop the base, unchecked: call :meth:`check_merge` before.

        A weight that nobody else holds is written to in place; any other stays as it is, and a new
        Parameter takes its place, as in :meth:`merge`.

        Raises:
            AdapterStateError: The layer is merged already, or its kind cannot be merged.
        """
        if not (self._fits_in_place() and is_held_alone(self.owner, self.weight_name)):
            self.adopt_merged(self.merged_parameters(safe=False), keep_base=False)
            return
        flip = self.output_axis == 1
        weight, factors = self.base_weight, self.summed_factors()
        add_product(weight, *factors, {}, transposed=flip, safe=False, in_place=True)
        self.adopt_in_place()

    def adopt_in_place(self) -> None:
        """Take note that the weight itself was written to, and holds the update."""
        self._kept = {}
        self.merged = True
        self.settle()

    def _fits_in_place(self) -> bool:
        """Whether the kernel can write the sum into the weight that there is."""
        if not self._adds_a_product or self.merged:
            return False
        return ops.merges_in_one_pass(self.base_weight, *self.summed_factors()[:2])

    @property
    def _adds_a_product(self) -> bool:
        """Whether a merge adds the product of the summed factors to the weight, and no more."""
        own = type(self).merged_parameters is MergeableLayer.merged_parameters
        present = [slot for slot, _ in self.present()]
        plain = all(not slot.has_magnitude and slot.branch_bias is None for slot in present)
        return own and bool(present) and plain

    def adopt_merged(self, merged: Mapping[str, Tensor], *, keep_base: bool) -> None:
        """Make ``merged``, a result of :meth:`merged_parameters`, the layer's own."""
        kept: dict[str, nn.Parameter | None] = {}
        for name, value in merged.items():
            base = kept[name] = self.owner._parameters.get(name)
            trained = base is not None and base.requires_grad
            setattr(self.owner, name, nn.Parameter(value, requires_grad=trained))
        self._kept = kept if keep_base else {}
        self.merged = True
        self.settle()

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
        self.settle()

    @property
    def can_unmerge(self) -> bool:
        """Whether the layer is merged and its base was kept."""
        return self.merged and bool(self._kept)

    @property
    def kept_parameters(self) -> Mapping[str, nn.Parameter]:
        """The base's own Parameters while merged, by name; empty if they were not kept."""
        return {name: base for name, base in self._kept.items() if base is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch has no types for it
        # Module.to() and its kin know of registered parameters only; the kept base moves along.
        move_along(self._kept, fn)
        return self

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


def move_along(
    kept: dict[str, nn.Parameter] | dict[str, nn.Parameter | None],
    fn: Callable[[Tensor], Tensor],
) -> None:
    """Do to Parameters that are not registered what ``Module._apply`` does to those that are."""
    for name, base in kept.items():
        if base is None:
            continue
        with torch.no_grad():
            moved = fn(base)
        if moved.is_meta == base.is_meta and type(base) is nn.Parameter:
            base.data = moved
        elif isinstance(moved, nn.Parameter):
            kept[name] = moved
        else:
            kept[name] = nn.Parameter(moved, requires_grad=base.requires_grad)
