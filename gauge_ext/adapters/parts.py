"""What an adapter on a layer is made of: the weight that it adapts, its factors, their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters import dora
from gauge_ext.adapters.merging import accumulation_dtype
from gauge_ext.adapters.protocol import Kind


class AdapterParts(nn.Module):
    r"""The parts of a layer's adapter, and what follows from them alone: s B A, DoRA's gain.

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
        merged: Whether the weight holds the update.
        has_branch: Whether ``forward`` adds the update: not while the weight holds it, nor while
            the adapter is disabled.
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
    has_branch: bool
    is_plain: bool
    _factor_names: tuple[str, ...]
    _start_names: tuple[str, ...]
    # The base's own Parameters while merged, if they were kept, by name; None where it had none.
    _kept: dict[str, nn.Parameter | None]

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of lora_A and lora_B of a rank on ``module``, adapted or not."""
        raise NotImplementedError

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``B A`` in the layout of the weight."""
        return torch.mm(lora_B, lora_A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the update ``s B A``: with a start, ``[A; A0]`` and ``[B, -B0]``."""
        if not self._start_names:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], 1)

    def summed_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A, B and s of everything that a merge adds."""
        return *self.factors(), self.scaling

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
