r"""DoRA (arXiv:2402.09353): the direction of a weight is adapted, and its length trained apart.

.. math:: W' = \mathrm{diag}(g)\,(W + s B A), \qquad g_i = m_i / \|(W + s B A)_i\|

The norms of the rows count as constants in the backward pass (section 4.3 of the paper), so the
gradient of the magnitude m is that of g over the norms, and A and B get theirs through g as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
