"""The gauge whose rank-one parts all weigh the same, and the measure of which it is the minimum.

Rounding each entry of a factor with an error proportional to it (floating point), or each column
b_i and row a_i with one scale of its own, gives X an expected squared error proportional to
sum_i |b_i|² |a_i|². Over all gauges that sum is at least |X|_*² / r: by Cauchy-Schwarz it is at
least (sum_i |b_i| |a_i|)² / r, and sum_i |b_i| |a_i| >= |X|_*. Equality asks for a balanced pair
with equal norms, and one exists since a symmetric matrix can be rotated to any diagonal that its
eigenvalues majorise (Schur-Horn).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.geometry import linalg
from gauge_ext.geometry.point import LoRAPoint


def quantisation_factor(point: LoRAPoint) -> Tensor:
    r"""Compute :math:`r \sum_i \|b_i\|^2 \|a_i\|^2 / \|X\|_*^2`, at least 1.

    By how much the expected squared error of rounding the factors (to a floating-point format, or
    with a scale for each b_i and a_i) exceeds that of the best gauge, ``equal_energy``, where it is
    1. In the svd gauge it is :math:`r \|X\|_F^2 / \|X\|_*^2`. It says nothing about integers with
    one scale for a whole factor, whose error follows the largest entry.

    Args:
        point: ``B (*batch, m, r)``, ``A (*batch, r, n)``.

    Returns:
        ``(*batch)`` in float64; 1 where nothing is to be rounded, infinite where the factors cancel
        to X = 0.
    """
    columns = linalg.to_double(point.B).square().sum(-2)
    rows = linalg.to_double(point.A).square().sum(-1)
    energy = point.rank * (columns * rows).sum(-1)
    nuclear = point.singular_values().sum(-1)
    return torch.where(energy == 0, 1.0, energy / nuclear.square())


def equal_energy_rotation(s: Tensor) -> Tensor:
    r"""Find an orthogonal Q for which the diagonal of :math:`Q \Sigma Q^T` is constant.

    A Hadamard matrix over sqrt(r) (Sylvester's) where r is a power of two, since all its entries
    have the same modulus; else at most r - 1 plane rotations, each of which brings the largest
    entry of the diagonal to the mean by mixing it with the smallest.

    Args:
        s: The diagonal of Sigma, ``(*, r)``, any real numbers.

    Returns:
        Q ``(*, r, r)`` in float64.

    Source:
        Chan and Li, Diagonal elements and eigenvalues of a real symmetric matrix, 1983.
    """
    s = linalg.to_double(s)
    r = s.shape[-1]
    if r & (r - 1) == 0:
        return _hadamard(r, s.device).expand(*s.shape, r).div(r**0.5)
    q: Tensor = torch.eye(r, dtype=s.dtype, device=s.device).expand(*s.shape, r)
    mean = s.mean(-1, keepdim=True)
    for _ in range(r - 1):
        excess = (q.square() * s.unsqueeze(-2)).sum(-1) - mean  # (*, r): diagonal minus mean
        high, low = excess.argmax(-1, keepdim=True), excess.argmin(-1, keepdim=True)
        above = excess.gather(-1, high).clamp(min=0.0)
        below = excess.gather(-1, low).neg().clamp(min=0.0)
        # The two rows share no direction (one row at most is mixed and not yet done), so the entry
        # between them is 0 and tan² of the angle is above / below. Where all is equal: no rotation.
        whole = above + below
        share = torch.where(whole > 0, above / torch.where(whole > 0, whole, 1.0), 0.0)
        sin, cos = share.sqrt(), (1.0 - share).sqrt()
        row_high, row_low = _row(q, high), _row(q, low)
        q = _with_row(q, high, cos * row_high + sin * row_low)
        q = _with_row(q, low, cos * row_low - sin * row_high)
    return q


def _row(q: Tensor, index: Tensor) -> Tensor:
    """Row ``index (*, 1)`` of ``q (*, r, r)``, as ``(*, r)``."""
    return q.gather(-2, index.unsqueeze(-1).expand(*index.shape, q.shape[-1])).squeeze(-2)


def _with_row(q: Tensor, index: Tensor, row: Tensor) -> Tensor:
    at = index.unsqueeze(-1).expand(*index.shape, q.shape[-1])
    return q.scatter(-2, at, row.unsqueeze(-2))


def _hadamard(r: int, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    while h.shape[0] < r:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h
