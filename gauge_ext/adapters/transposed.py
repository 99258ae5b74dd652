"""transformers' ``Conv1D``, a linear layer whose weight lies transposed, with an adapter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters import branches, recompute
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.slot import AdapterSlot


class LoRATransposed(AdaptedLayer):
    r"""A linear layer with its weight (in, out), as GPT-2 has it, and a LoRA adapter.

    .. math:: y = x W + b + s\,(x \circ M / (1 - p))\, A^T B^T

    ``lora_A`` (r, in) and ``lora_B`` (out, r) are those of a linear layer; the update of W is the
    transpose of s B A, which PEFT calls ``fan_in_fan_out``.

    The class is known by its name, since transformers is not imported here.
    """

    is_linear = True
    output_axis = 1

    nx: int
    nf: int
    weight: Tensor
    bias: Tensor

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Say whether ``module`` is a ``Conv1D`` of transformers."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, in)`` and ``(out, rank)``."""
        return (rank, module.nx), (module.nf, rank)

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``(B A)ᵀ``, ``(in, out)``."""
        return torch.mm(lora_A.mT, lora_B.mT)

    def matrices(self, slot: AdapterSlot) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight transposed, ``(out, in)``, and A and B of an adapter."""
        return self.weight.mT, *slot.factors()

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            x: ``(*batch, in)``.

        Returns:
            ``(*batch, out)``.
        """
        weight = self.weight.mT
        if not self.has_branch:
            return F.linear(x, weight, self.bias)
        output = partial(branches.linear, self, weight=weight, bias=self.bias)
        return recompute.call(output, x) if self.recomputes_input else output(x)
