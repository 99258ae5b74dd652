"""The invariant metric on factor pairs, the metric it gives the updates, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.base import BaseVector, left_apply, require_base_vector, right_apply
from gauge_ext.geometry.linalg import thin_qr, to_double
from gauge_ext.geometry.point import LoRAPoint, LoRATangent


def metric(point: LoRAPoint, eta: LoRATangent, xi: LoRATangent) -> Tensor:
    r"""The GL(r)-invariant metric of Mishra et al. (arXiv:1209.0430, arXiv:1211.1550).

    .. math:: g(\eta, \xi) = \mathrm{tr}(A A^T \eta_B^T \xi_B) + \mathrm{tr}(B^T B\,\eta_A \xi_A^T)
        = \langle \eta_B A, \xi_B A\rangle + \langle B \eta_A, B \xi_A\rangle

    Invariant: :math:`g(G\eta, G\xi)` at :math:`G\cdot(B, A)` equals :math:`g(\eta, \xi)` at
    :math:`(B, A)`. Computed as inner products of :math:`\eta_B R_A^T` and :math:`R_B \eta_A`, with
    R from QR, so that no Gram matrix is formed. At a rank-deficient point it is only semidefinite.

    Args:
        point: (B, A).
        eta: A tangent vector at the point.
        xi: Another.

    Returns:
        ``(*batch)`` in float64.

    Raises:
        GeometryError: A tangent vector has another shape than the point.
    """
    eta.require_at(point)
    xi.require_at(point)
    r_b, r_a = thin_qr(point.B)[1], thin_qr(point.A.mT)[1]
    left = (to_double(eta.B) @ r_a.mT) * (to_double(xi.B) @ r_a.mT)
    right = (r_b @ to_double(eta.A)) * (r_b @ to_double(xi.A))
    return torch.add(left.sum((-2, -1)), right.sum((-2, -1)))


def quotient_metric(point: LoRAPoint, z: BaseVector, y: BaseVector | None = None) -> Tensor:
    r"""The metric that :func:`metric` gives the updates: that of the horizontal lifts.

    .. math:: g(Z, Z) = \tfrac12 \|P_U Z P_V\|^2 + \|P_U^\perp Z P_V\|^2 + \|P_U Z P_V^\perp\|^2

    with the projections onto the column space U and row space V of X = B A, hence
    :math:`\tfrac12 \|Z\|_F^2 \le g(Z, Z) \le \|Z\|_F^2`. No factor of X enters, only X.

    Args:
        point: A pair with product X, in any gauge.
        z: A tangent vector at X, dense ``(*batch, m, n)`` or as the product of a pair. Only its
            part tangent to the matrices of rank r counts.
        y: Another; None for ``z`` itself.

    Returns:
        ``(*batch)`` in float64.

    Raises:
        GeometryError: The rank of X is below r, or a vector has another shape than X.
    """
    point.require_full_rank("The metric of the updates")
    q_b, q_a = thin_qr(point.B)[0], thin_qr(point.A.mT)[0]
    first = _tangent_blocks(point, q_b, q_a, z)
    second = first if y is None else _tangent_blocks(point, q_b, q_a, y)
    inner, left, right = (torch.mul(a, b).sum((-2, -1)) for a, b in zip(first, second, strict=True))
    return torch.add(left + right, inner, alpha=0.5)


def _tangent_blocks(
    point: LoRAPoint, q_b: Tensor, q_a: Tensor, z: BaseVector
) -> tuple[Tensor, Tensor, Tensor]:
    """The three blocks of a vector: (r, r) inside, (m, r) outside U, (r, n) outside V."""
    require_base_vector(point, z)
    zv, uz = right_apply(z, q_a), left_apply(q_b.mT, z)
    inner = uz @ q_a
    return inner, zv - q_b @ inner, uz - inner @ q_a.mT


def riemannian_gradient(
    point: LoRAPoint, gradient: LoRATangent, *, damping: float = 0.0
) -> LoRATangent:
    r"""Turn the derivatives of a loss by B and A into its gradient in :func:`metric`.

    .. math:: \eta_B = g_B (A A^T)^{-1}, \qquad
        \eta_A = \bigl(B^T B + \delta (A A^T)^{-1}\bigr)^{-1} g_A

    With :math:`\delta = 0` this is the direction of ScaledGD (arXiv:2005.08898): the Riesz
    representative of the differential, horizontal for a loss of B A, and then
    :math:`d\pi(\eta) = P_U \nabla f + \nabla f P_V`. With :math:`\delta > 0` it is defined for
    B = 0 too and still covariant, unlike :math:`(B^T B + \delta I)^{-1}`: on the update it acts as
    the filter :math:`\sigma^2 / (\sigma^2 + \delta)` of the singular values of X.

    Args:
        point: (B, A).
        gradient: :math:`(g_B, g_A)`, the derivatives by the effective factor B and by A.
        damping: :math:`\delta \ge 0`, in units of :math:`\sigma(X)^2`.

    Returns:
        A tangent vector in the dtype of the point.

    Raises:
        GeometryError: The damping is negative; the rank of X (without damping) or of A (with it)
            is below r.
    """
    gradient.require_at(point)
    if not damping >= 0.0:
        raise GeometryError(f"damping must be at least 0, got {damping}.")
    if damping == 0.0:
        point.require_full_rank("The gradient without damping")
    else:
        # A A^T: its rank is that of A.
        LoRAPoint(point.A.mT, point.A).require_full_rank("The gradient")
    g_b, g_a = to_double(gradient.B), to_double(gradient.A)
    lower = thin_qr(point.A.mT)[1].mT  # A = L Q^T, A A^T = L L^T
    half = torch.linalg.solve_triangular(lower.mT, g_b, upper=True, left=False)
    eta_b = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    # B^T B + d (L L^T)^-1 = L^-T (K^T K + d I) L^-1 with K = B L, and K^T K + d I = R^T R.
    k = to_double(point.B) @ lower
    if damping > 0.0:
        eye = torch.eye(point.rank, dtype=k.dtype, device=k.device)
        k = torch.cat([k, damping**0.5 * eye.expand_as(lower)], -2)
    r = thin_qr(k)[1]
    half = torch.linalg.solve_triangular(r.mT, lower.mT @ g_a, upper=False)
    eta_a = lower @ torch.linalg.solve_triangular(r, half, upper=True)
    return LoRATangent(eta_b.to(point.dtype), eta_a.to(point.dtype))
