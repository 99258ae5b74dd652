"""The ops: each has a compiled kernel, and the same formula in plain torch in ``reference``."""

from gauge_ext.ops import factor_reference, reference
from gauge_ext.ops.dora_row_norms import dora_row_norms
from gauge_ext.ops.dora_scale import dora_scale
from gauge_ext.ops.factor_step import factor_gradient_norm, gauge_adam_step, scaled_gd_step
from gauge_ext.ops.lora_embedding import lora_embedding
from gauge_ext.ops.lora_gather import lora_gather
from gauge_ext.ops.lora_linear import draw_seed, lora_linear
from gauge_ext.ops.lora_linear_group import lora_linear_group
from gauge_ext.ops.lora_rite import RiteState, lora_rite_step
from gauge_ext.ops.merge import MergeSums, merge_, merge_into, merges_in_one_pass

__all__ = [
    "MergeSums",
    "RiteState",
    "dora_row_norms",
    "dora_scale",
    "draw_seed",
    "factor_gradient_norm",
    "factor_reference",
    "gauge_adam_step",
    "lora_embedding",
    "lora_gather",
    "lora_linear",
    "lora_linear_group",
    "lora_rite_step",
    "merge_",
    "merge_into",
    "merges_in_one_pass",
    "reference",
    "scaled_gd_step",
]
