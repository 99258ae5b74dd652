"""What the adapters on a layer are made of: the weight that they adapt, factors, their layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gauge_ext import ops
from gauge_ext.adapters import dora
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.slot import AdapterSlot


class AdapterParts(AdapterSlot):
    r"""The parts of a layer's adapters, and what follows from them alone: s B A, DoRA's gain.

    The layer is itself the slot of its first adapter. What depends on one adapter is asked of the
    layer with the slot: that knows the numbers, and this their layout.

    Attributes:
        bases: The classes that it stands in for; exactly these, since a subclass may compute
            something else.
        weight_name: The parameter that it adapts.
        kind: See :class:`~gauge_ext.adapters.protocol.Adapter`.
        is_linear: Whether "all-linear" means it.
        output_axis: The axis of the weight that runs over the outputs.
        companions: Paths of layers inside it that are adapted along with it.
        rows_refusal: Why rows of a batch cannot have adapters of their own here; None: they can.
        base_class: The class that the layer had before and will have again.
        merged: Whether the weight holds the update.
        has_branch: Whether ``forward`` adds an update: not while the weight holds it, while the
            adapters are disabled, or while none of the active ones is on this layer.
        is_plain: Whether all that ``forward`` adds are the layer's own lora_A and lora_B: no
            further adapter is active, and there is no magnitude (``lora_magnitude``, DoRA) and no
            bias of the branch (``lora_bias``).
    """

    bases: ClassVar[tuple[type[nn.Module], ...]] = ()
    weight_name: str = "weight"
    kind: ClassVar[Kind] = "linear"
    is_linear: ClassVar[bool] = False
    output_axis: ClassVar[int] = 0
    companions: ClassVar[tuple[str, ...]] = ()
    rows_refusal: ClassVar[str | None] = None
    base_class: ClassVar[type[nn.Module]]

    merged: bool
    has_branch: bool
    is_plain: bool
    # The base's own Parameters while merged, if they were kept, by name; None where it had none.
    _kept: dict[str, nn.Parameter | None]

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of lora_A and lora_B of a rank on ``module``, adapted or not.

        Each kind of layer defines it.
        """
        raise NotImplementedError(f"{cls.__name__} defines no factor_shapes()")

    @property
    def blocks(self) -> int:
        """How many blocks of r rows each lora_A has, one after the other; all have one lora_B."""
        return 1

    def rank_of(self, slot: AdapterSlot) -> int:
        """Return r of one of the layer's adapters."""
        return slot.lora_A.shape[0]

    @property
    def rank(self) -> int:
        """R of the layer's first adapter."""
        return self.rank_of(self)

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``B A`` in the layout of the weight."""
        return torch.mm(lora_B, lora_A)

    def side_by_side(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return factors of the sum of the ranks, whose product is the sum of the products."""
        if self.blocks == 1:
            lora_A = torch.cat([a for a, _ in pairs])
        else:
            parts = [a.unflatten(0, (self.blocks, -1)) for a, _ in pairs]
            lora_A = torch.cat(parts, 1).flatten(0, 1)
        return lora_A, torch.cat([b for _, b in pairs], 1)

    @torch.no_grad()
    def fill(self, slot: AdapterSlot, lora_A: Tensor, lora_B: Tensor) -> None:
        """Write factors of the same or a lower rank into a slot's own, with zeros beyond."""
        own = slot.lora_A.zero_().unflatten(0, (self.blocks, -1))
        given = lora_A.unflatten(0, (self.blocks, -1))
        own[:, : given.shape[1]].copy_(given)
        slot.lora_B.zero_()[:, : lora_B.shape[1]].copy_(lora_B)

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

    def matrices(self, slot: AdapterSlot) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight ``(out, in)``, and A ``(r, in)`` and B ``(out, r)`` of an adapter."""
        return self.base_weight, *slot.factors()

    def mergeable_weight(self) -> Tensor:
        """Return the weight in the layout of :meth:`delta_weight`."""
        return self.base_weight

    def gain(self, slot: AdapterSlot) -> Tensor:
        """Return by how much DoRA scales each output, ``(out,)``; the norms are constants."""
        norms = ops.dora_row_norms(*self.matrices(slot), slot.scaling)
        return dora.gain(slot.lora_magnitude, norms)

    def tensors_of(self, slot: AdapterSlot) -> Mapping[str, Tensor]:
        """Return what is saved of an adapter, by the names of the :class:`Adapter` protocol.

        An update that counts from a start is saved as one of twice the rank.
        """
        lora_A, lora_B = slot.factors()
        return {**slot.trained(), "lora_A": lora_A, "lora_B": lora_B}

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return what is saved of the first adapter, see :meth:`tensors_of`."""
        return self.tensors_of(self)
