"""The forward of linear layers with more than two factors: a start, a bias of the branch, DoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gauge_ext import ops

if TYPE_CHECKING:
    from gauge_ext.adapters.layer import AdaptedLayer


def linear(layer: AdaptedLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""Return the output of an unmerged linear layer with any adapter.

    .. math:: y = g \circ \bigl(x W^T + s\,(\tilde x A^T B^T + \beta)\bigr) + b

    with the inputs after dropout :math:`\tilde x`, the branch's bias :math:`\beta` (``lora_bias``)
    and DoRA's gain g, where the adapter has them. Dropout is on the branch alone, also under DoRA:
    PEFT there drops inputs of W as well, which costs a second product with W and has the same mean.

    Args:
        layer: The adapted layer.
        x: ``(*batch, in)``.
        weight: W, ``(out, in)``.
        bias: b, ``(out,)``, or None.

    Returns:
        ``(*batch, out)``, of x's dtype.
    """
    drop = layer.training and layer.dropout_p > 0.0
    has_magnitude = layer.has_magnitude
    inner = None if has_magnitude else bias
    if layer.branch_bias is not None:
        shift = layer.scaling * layer.branch_bias
        inner = (shift if inner is None else inner + shift).to(x.dtype)
    lora_A, lora_B = layer.factors()
    y = ops.lora_linear(
        x,
        weight,
        inner,
        lora_A,
        lora_B,
        layer.scaling,
        layer.dropout_p if drop else 0.0,
        ops.draw_seed() if drop else None,
    )
    if not has_magnitude:
        return y
    gain = layer.gain()
    # Promoted to the gain's dtype where that is wider, so that it isn't rounded first.
    scaled = y * gain if bias is None else torch.addcmul(bias.to(gain.dtype), y, gain)
    return scaled.to(y.dtype)
