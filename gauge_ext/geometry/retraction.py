"""Steps along the matrices of rank r, and tangent vectors carried along with them."""

from __future__ import annotations

import torch

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.connection import horizontal_lift, project
from gauge_ext.geometry.linalg import product_svd, to_double
from gauge_ext.geometry.point import LoRAPoint, LoRATangent


def retract(point: LoRAPoint, eta: LoRATangent) -> LoRAPoint:
    r"""Step from X along :math:`Z = d\pi(\eta)` and return to rank r: :math:`P_r(X + Z)`.

    .. math:: X + Z = [B, \eta_B]\,[A + \eta_A;\, A]

    which is truncated by two QR decompositions and the SVD of a 2r x 2r core (the metric projection
    of Absil and Malick, SIAM J. Optim. 22, 2012; that of ``pymanopt``). For a step of length t the
    tangential part of the error is :math:`O(t^3)`; that of :math:`(B + \eta_B)(A + \eta_A)` is
    :math:`O(t^2)`. Vertical parts of ``eta`` change nothing.

    Args:
        point: (B, A); its rank may be below r, as that of B = 0 is.
        eta: A tangent vector at the point.

    Returns:
        The new point, balanced: :math:`(U \Sigma^{1/2}, \Sigma^{1/2} V^T)`. A frame that follows
        the one of ``point`` comes from :func:`~gauge_ext.geometry.transport.transport`.

    Raises:
        GeometryError: The vector has another shape, or r exceeds a side of X.
    """
    eta.require_at(point)
    if point.rank > min(point.shape):
        raise GeometryError(
            f"no matrix of shape {point.shape} has rank {point.rank}, so there is nothing to "
            "retract to."
        )
    b, a = to_double(point.B), to_double(point.A)
    left = torch.cat([b, to_double(eta.B)], -1)
    right = torch.cat([a + to_double(eta.A), a], -2)
    u, s, vh = product_svd(left, right)
    r = point.rank
    root = s[..., :r].sqrt()
    return LoRAPoint(
        (u[..., :r] * root.unsqueeze(-2)).to(point.dtype),
        (root.unsqueeze(-1) * vh[..., :r, :]).to(point.dtype),
    )


def vector_transport(start: LoRAPoint, end: LoRAPoint, eta: LoRATangent) -> LoRATangent:
    r"""Carry a change of X from one point to another by orthogonal projection.

    .. math:: Z = d\pi(\eta) \mapsto \mathrm{lift}_{end}(P_{T_{end}} Z)

    The projection of the embedding space, as in Riemannian conjugate gradients and momentum; all
    in factor form, O((m + n) r²). It depends on the two updates and on no frame of either.

    Args:
        start: Where ``eta`` lives.
        end: Where it is to live.
        eta: A tangent vector at ``start``; only its change of the update counts.

    Returns:
        A horizontal tangent vector at ``end``.

    Raises:
        GeometryError: The rank at ``end`` is below r, or shapes do not fit.
    """
    return horizontal_lift(end, project(start, eta))
