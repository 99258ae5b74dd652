"""The tensors and numbers of one adapter on a layer, apart from the layer."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn


class AdapterSlot(nn.Module):
    """What one adapter consists of, whatever the kind of its layer.

    A layer is itself the slot of its first adapter; those beside it lie in ``slots.NAME``, under
    the same names.

    Attributes:
        lora_A: A, in the shape of the layer's kind.
        lora_B: B.
        lora_A0: With ``lora_B0`` the constant start that the update counts from, where it has one
            (see :mod:`gauge_ext.adapters.inits`).
        lora_magnitude: m of DoRA, where it is one.
        lora_bias: β of the branch, where it has one.
        tokens: Of trained tokens, which they are, in the order of their rows.
        scaling: s, applied to the product of the factors.
        dropout_p: The probability with which training drops an input of the branch.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: nn.Parameter
    lora_B0: nn.Parameter
    lora_magnitude: nn.Parameter
    lora_bias: nn.Parameter
    tokens: tuple[int, ...]
    scaling: float
    dropout_p: float
    _factor_names: tuple[str, ...]
    _start_names: tuple[str, ...]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the update ``s B A``: with a start, ``[A; A0]`` and ``[B, -B0]``."""
        if not self._start_names:
            # A batch may ask this of many adapters: nn.Module.__getattr__ is most of the time then.
            p = cast("dict[str, nn.Parameter]", self._parameters)
            try:
                return p["lora_A"], p["lora_B"]
            except KeyError:  # torch.nn.utils.parametrize moves a parameter elsewhere
                return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], 1)

    @property
    def has_two_factors(self) -> bool:
        """Whether lora_A and lora_B are all there is to it."""
        return len(self._factor_names) == 2 and not self._start_names

    @property
    def has_magnitude(self) -> bool:
        """Whether it is a DoRA."""
        return "lora_magnitude" in self._factor_names

    @property
    def branch_bias(self) -> nn.Parameter | None:
        """The bias that is added to B A x before the scaling, if there is one."""
        return self.lora_bias if "lora_bias" in self._factor_names else None

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what training changes of this adapter, by name."""
        return {name: getattr(self, name) for name in self._factor_names}

    def own_names(self) -> tuple[str, ...]:
        """Return the names of all its parameters, trained or constant."""
        return self._factor_names + self._start_names

    def keep_start(self) -> None:
        """Make the factors of now the constant start, from which the update counts."""
        self.lora_A0 = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.lora_B0 = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)
        self._start_names = ("lora_A0", "lora_B0")

    def take(self, other: AdapterSlot) -> Self:
        """Become what ``other`` is: its parameters, the same objects, and its numbers."""
        for name in self.own_names():
            delattr(self, name)
        for name in other.own_names():
            setattr(self, name, getattr(other, name))
        self.scaling, self.dropout_p = other.scaling, other.dropout_p
        self._factor_names, self._start_names = other._factor_names, other._start_names
        return self
