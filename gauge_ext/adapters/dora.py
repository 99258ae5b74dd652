r"""DoRA (arXiv:2402.09353): the direction of a weight is adapted, and its length trained apart.

.. math:: W' = \mathrm{diag}(g)\,(W + s B A), \qquad g_i = m_i / \|(W + s B A)_i\|

The norms of the rows count as constants in the backward pass (section 4.3 of the paper), so the
gradient of the magnitude m is that of g over the norms, and A and B get theirs through g as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext import ops


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return the norm of each row of ``W + s B A``, ``(out,)``, without forming B A.

    .. math:: \|W_i\|^2 + 2 s \langle (W A^T)_i, B_i \rangle + s^2 B_i (A A^T) B_i^T

    Args:
        weight: W, ``(out, in)``.
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scaling: s.

    Returns:
        In float32, or in float64 where W or a factor is.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    a, b = lora_A.to(wide), lora_B.to(wide)
    products = torch.addmm(
        ops.project(weight, a), b, a @ a.mT, beta=2.0 * scaling, alpha=scaling * scaling
    )
    squares: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()
    squares += products.mul_(b).sum(1)
    # Rounding may leave a row of zeros a little below zero.
    squares.clamp_min_(0.0).sqrt_()
    return squares


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return g = m / norms, ``(out,)``; a row of zeros stays one."""
    return magnitude.flatten() / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def rescale(total: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Scale ``W + s B A`` itself, in place, to have the norms m along ``axis``.

    Args:
        total: The sum, in the layout of the layer's weight.
        magnitude: m, of as many entries as ``total`` has along ``axis``.
        axis: That of the outputs.
    """
    others = [dim for dim in range(total.dim()) if dim != axis]
    norms = torch.linalg.vector_norm(total, dim=others, keepdim=True)
    factors = gain(magnitude.to(total.dtype), norms.flatten())
    return total.mul_(factors.view_as(norms))
