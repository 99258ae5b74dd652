"""The ops: each has a compiled kernel, and the same formula in plain torch in ``reference``."""

from gauge_ext.ops import reference
from gauge_ext.ops.lora_linear import draw_seed, lora_linear

__all__ = ["draw_seed", "lora_linear", "reference"]
