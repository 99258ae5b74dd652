"""Distances and angles between updates, from their factors and independent of the gauge of both."""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.linalg import numerical_rank, product_svd, thin_qr, to_double
from gauge_ext.geometry.point import LoRAPoint


def _require_comparable(first: LoRAPoint, second: LoRAPoint) -> None:
    if first.shape != second.shape or first.batch_shape != second.batch_shape:
        raise GeometryError(
            "two updates are compared entry by entry and need one shape, got "
            f"{(*first.batch_shape, *first.shape)} and {(*second.batch_shape, *second.shape)}."
        )


def frobenius_distance(first: LoRAPoint, second: LoRAPoint) -> Tensor:
    r"""The distance :math:`\|B_1 A_1 - B_2 A_2\|_F` of two updates, of equal rank or not.

    .. math:: [B_1, B_2] = Q_L R_L, \quad [A_1; -A_2]^T = Q_R R_R \quad\Rightarrow\quad
        \|B_1 A_1 - B_2 A_2\|_F = \|R_L R_R^T\|_F

    O((m + n) r²) and no difference of large numbers but the one that is asked for: the distance of
    an update to itself in another gauge is rounding.

    Args:
        first: (B1, A1).
        second: (B2, A2), of the same m, n and batch shape.

    Returns:
        ``(*batch)`` in float64.

    Raises:
        GeometryError: The shapes differ.
    """
    _require_comparable(first, second)
    left = torch.cat([to_double(first.B), to_double(second.B)], -1)
    right = torch.cat([to_double(first.A), -to_double(second.A)], -2)
    core = thin_qr(left)[1] @ thin_qr(right.mT)[1].mT
    norm: Tensor = torch.linalg.matrix_norm(core)
    return norm


def procrustes_alignment(first: LoRAPoint, second: LoRAPoint) -> Tensor:
    r"""The rotation that brings the second pair of factors closest to the first.

    .. math:: Q = \arg\min_{Q \in O(r)} \|B_1 - B_2 Q\|_F^2 + \|A_1 - Q^T A_2\|_F^2

    from the SVD of :math:`B_2^T B_1 + A_2 A_1^T`; ``second.act(Q.mT)`` is the aligned pair. For
    the factors as they are given: only between balanced pairs (:math:`B^T B = A A^T`) does the
    result have an invariant meaning, see :func:`procrustes_distance`.

    Args:
        first: (B1, A1).
        second: (B2, A2), of the same shape and r.

    Returns:
        Q, ``(*batch, r, r)`` orthogonal, in the dtype of ``second``.

    Raises:
        GeometryError: The shapes or ranks differ.
    """
    _require_comparable(first, second)
    if first.rank != second.rank:
        raise GeometryError(
            "a rotation aligns pairs of one rank, "
            f"got {first.rank} and {second.rank}; pad the smaller with zeros."
        )
    cross = to_double(second.B).mT @ to_double(first.B)
    cross = cross + to_double(second.A) @ to_double(first.A).mT
    return _polar(cross).to(second.dtype)


def _polar(x: Tensor) -> Tensor:
    """The orthogonal polar factor of square matrices."""
    u, _, vh = torch.linalg.svd(x)
    return torch.matmul(u, vh)


def procrustes_distance(first: LoRAPoint, second: LoRAPoint) -> Tensor:
    r"""The distance of two updates as balanced factor pairs up to rotation.

    .. math:: d^2 = \min_{Q \in O(r)} \|Y_1 - Y_2 Q\|_F^2, \qquad
        Y = \begin{bmatrix} U \Sigma^{1/2} \\ V \Sigma^{1/2} \end{bmatrix}

    This is the Bures-Wasserstein distance of the positive semidefinite matrices
    :math:`Y Y^T = \begin{bmatrix} (X X^T)^{1/2} & X \\ X^T & (X^T X)^{1/2} \end{bmatrix}` (Bhatia,
    Jain and Lim, Expo. Math. 37, 2019, theorem 1). Gauges do not matter, since the balanced pairs
    are made here, and ranks may differ or be deficient.

    Args:
        first: (B1, A1) in any gauge.
        second: (B2, A2) in any gauge, of the same m, n and batch shape.

    Returns:
        ``(*batch)`` in float64, in units of the square root of an update.

    Raises:
        GeometryError: The shapes differ.
    """
    _require_comparable(first, second)
    y1, y2 = _balanced_stack(first), _balanced_stack(second)
    missing = y1.shape[-1] - y2.shape[-1]
    y1 = torch.nn.functional.pad(y1, (0, max(-missing, 0)))
    y2 = torch.nn.functional.pad(y2, (0, max(missing, 0)))
    distance: Tensor = torch.linalg.matrix_norm(y1 - y2 @ _polar(y2.mT @ y1))
    return distance


bures_wasserstein_distance = procrustes_distance
"""Another name of :func:`procrustes_distance`."""


def _balanced_stack(point: LoRAPoint) -> Tensor:
    u, s, vh = product_svd(point.B, point.A)
    return torch.cat([u, vh.mT], -2) * s.sqrt().unsqueeze(-2)


def principal_angles(first: LoRAPoint, second: LoRAPoint) -> tuple[Tensor, Tensor]:
    r"""The angles between the column spaces, and between the row spaces, of two updates.

    Cosines are the singular values of :math:`U_1^T U_2`. They say nothing about small angles, so
    those below 45° come from the sines, the singular values of :math:`(I - U_1 U_1^T) U_2`
    (Björck and Golub, Math. Comp. 27, 1973; Knyazev and Argentati, SIAM J. Sci. Comput. 23, 2002).
    The spaces are those of the update's numerical rank, whatever r is.

    Args:
        first: (B1, A1) in any gauge.
        second: (B2, A2) in any gauge, of the same m, n and batch shape.

    Returns:
        Angles of the column spaces and of the row spaces, ``(*batch, k)`` each, ascending, in
        radians and float64, with k the smaller of the two numerical ranks.

    Raises:
        GeometryError: The shapes differ, or the numerical rank varies within a batch.
    """
    _require_comparable(first, second)
    (u1, v1), (u2, v2) = _spaces(first), _spaces(second)
    if u1.shape[-1] < u2.shape[-1]:
        u1, v1, u2, v2 = u2, v2, u1, v1
    return _angles(u1, u2), _angles(v1, v2)


def _spaces(point: LoRAPoint) -> tuple[Tensor, Tensor]:
    u, s, vh = product_svd(point.B, point.A)
    ranks = numerical_rank(s.detach(), *point.shape, point.dtype)
    rank = int(ranks.max()) if ranks.numel() else 0
    if bool((ranks < rank).any()):
        raise GeometryError(
            f"the numerical rank varies within a batch, from {int(ranks.min())} to {rank}, and so "
            "does the number of angles; compare the members one by one."
        )
    return u[..., :rank], vh[..., :rank, :].mT


def _angles(large: Tensor, small: Tensor) -> Tensor:
    cross = large.mT @ small
    cosine: Tensor = torch.linalg.svdvals(cross).clamp(max=1.0)
    sine: Tensor = torch.linalg.svdvals(small - large @ cross).flip(-1).clamp(max=1.0)
    return torch.where(cosine.square() >= 0.5, sine.asin(), cosine.acos())
