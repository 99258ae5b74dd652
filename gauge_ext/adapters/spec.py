"""What one layer's adapter is to be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gauge_ext.errors import ConfigError

if TYPE_CHECKING:  # see config
    import torch

Init = str
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
_RANDOMIZED = r"pissa_niter_[1-9]\d*"


def is_init(value: object) -> bool:
    """Say whether ``value`` names a start of the factors: one of INITS, or "pissa_niter_" + n."""
    return isinstance(value, str) and (value in INITS or bool(re.fullmatch(_RANDOMIZED, value)))


@dataclass(frozen=True)
class AdapterSpec:
    """The numbers of the adapter on one layer; it checks itself.

    Attributes:
        rank: r, at least 1.
        scaling: s.
        dropout: p, in [0, 1).
        init: How lora_A starts, see :class:`~gauge_ext.adapters.LoRAConfig`.
        dtype: Dtype of the factors; None: float32 on half-precision bases, else the base's own.
        use_dora: Whether a magnitude is trained beside the factors (DoRA).
        lora_bias: Whether the branch has a bias of its own.

    Raises:
        ConfigError: A number cannot be used.
    """

    rank: int = 8
    scaling: float = 1.0
    dropout: float = 0.0
    init: Init = "kaiming"
    dtype: torch.dtype | None = None
    use_dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if not math.isfinite(self.scaling):
            raise ConfigError(f"scaling must be a finite number, got {self.scaling}.")
