"""What the layers above ask of an adapted layer, whatever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor, nn

# How the tensors of an adapter are laid out and named in a file:
# - "linear": A (r, in), B (out, r); also convolutions, A (r, in, *k), B (out, r / groups, 1, ...)
# - "embedding": A (r, vocab), B (dim, r)
# - "out_proj": as "linear", for the output projection inside nn.MultiheadAttention
# - "parameter": A (r E, in), B (out, r E), for E stacked matrices in a bare parameter
# - "tokens": not low-rank; the rows of some tokens, (n, dim)
Kind = Literal["linear", "embedding", "out_proj", "parameter", "tokens"]


class Adapter(Protocol):
    """A low-rank update of one weight of a frozen base.

    Attributes:
        scaling: s.
    """

    scaling: float

    @property
    def kind(self) -> Kind:
        """How the adapter lies in a file."""

    @property
    def rank(self) -> int:
        """R."""

    def adapter_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what training changes, by the names in the module."""

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return what is saved: ``lora_A``, ``lora_B`` and, where it has them, the other tensors.

        ``lora_magnitude``: of DoRA; ``lora_bias``: of the branch.
        """

    def delta_weight(self) -> Tensor:
        """Return the update ``s B A``, in the layout of the base's weight."""

    def merged_weight(self, *, safe: bool = True) -> Tensor:
        """Return the base's weight with the adapter in it, rounded once."""
