r"""The connection: which changes of the factors are only changes of gauge, and which are not.

A tangent vector at (B, A) is vertical if it leaves X = B A alone to first order, and horizontal if
it is orthogonal to all vertical ones in the invariant :func:`~gauge_ext.geometry.metric.metric`.
The connection form :math:`\omega` reads off the vertical part; no Sylvester equation is solved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.base import BaseVector, left_apply, require_base_vector, right_apply
from gauge_ext.geometry.linalg import thin_qr, to_double
from gauge_ext.geometry.point import LoRAPoint, LoRATangent


def vertical(point: LoRAPoint, generator: Tensor) -> LoRATangent:
    r"""The velocity of a change of gauge: :math:`v_\Lambda = (-B\Lambda, \Lambda A)`.

    Args:
        point: (B, A).
        generator: :math:`\Lambda \in \mathfrak{gl}(r)`, ``(*batch, r, r)``.

    Returns:
        The derivative of :math:`\exp(t\Lambda) \cdot (B, A)` at t = 0; :func:`project` of it is 0.

    Raises:
        GeometryError: The generator has another shape.
    """
    expected = (*point.batch_shape, point.rank, point.rank)
    if generator.shape != expected:
        raise GeometryError(
            f"a generator must have shape {expected}, got {tuple(generator.shape)}."
        )
    double = to_double(generator)
    return LoRATangent(
        torch.matmul(to_double(point.B), -double).to(point.dtype),
        torch.matmul(double, to_double(point.A)).to(point.dtype),
    )


def connection_form(point: LoRAPoint, eta: LoRATangent, weight: float = 0.5) -> Tensor:
    r"""The connection form, with values in :math:`\mathfrak{gl}(r)`.

    .. math:: \omega_s(\eta) = s\,\eta_A A^+ - (1 - s)\, B^+ \eta_B

    It returns the generator of a vertical vector, :math:`\omega(v_\Lambda) = \Lambda`, and is
    equivariant, :math:`\omega(G\eta) = G\,\omega(\eta)\,G^{-1}`. For s = 1/2 its kernel is the
    orthogonal complement of the vertical space in the invariant metric. The others are connections
    too: the flow of :func:`~gauge_ext.geometry.metric.riemannian_gradient` with step sizes of B
    and A in the ratio s : (1 - s) is horizontal for :math:`\omega_s`, so that the ratio of LoRA+
    (arXiv:2402.12354) is a choice of connection.

    Args:
        point: (B, A).
        eta: A tangent vector at the point.
        weight: s.

    Returns:
        ``(*batch, r, r)`` in the dtype of the point.

    Raises:
        GeometryError: The rank of B A is below r, or the vector has another shape.
    """
    eta.require_at(point)
    point.require_full_rank("The connection")
    return _connection_form(point, eta, weight).to(point.dtype)


def _connection_form(point: LoRAPoint, eta: LoRATangent, weight: float) -> Tensor:
    q_b, r_b = thin_qr(point.B)
    q_a, r_a = thin_qr(point.A.mT)
    from_b = torch.linalg.solve_triangular(r_b, q_b.mT @ to_double(eta.B), upper=True)
    from_a = torch.linalg.solve_triangular(r_a.mT, to_double(eta.A) @ q_a, upper=False, left=False)
    return torch.add(weight * from_a, from_b, alpha=weight - 1.0)


def horizontal(point: LoRAPoint, eta: LoRATangent, weight: float = 0.5) -> LoRATangent:
    r"""The horizontal part :math:`\eta - v_{\omega(\eta)}` of a tangent vector.

    .. math:: (\eta_B + B\,\omega(\eta),\; \eta_A - \omega(\eta)\,A)

    The same change of X as ``eta`` to first order, and the shortest one if ``weight`` is 1/2.

    Args:
        point: (B, A).
        eta: A tangent vector at the point.
        weight: s of :func:`connection_form`.

    Raises:
        GeometryError: The rank of B A is below r, or the vector has another shape.
    """
    eta.require_at(point)
    point.require_full_rank("The connection")
    omega = _connection_form(point, eta, weight)
    return LoRATangent(
        (to_double(eta.B) + to_double(point.B) @ omega).to(point.dtype),
        (to_double(eta.A) - omega @ to_double(point.A)).to(point.dtype),
    )


def project(point: LoRAPoint, eta: LoRATangent) -> LoRAPoint:
    r"""The derivative of (B, A) -> B A: :math:`d\pi(\eta) = \eta_B A + B \eta_A`, in factor form.

    Args:
        point: (B, A).
        eta: A tangent vector at the point.

    Returns:
        The pair :math:`([\eta_B, B], [A; \eta_A])` of inner size 2r, whose ``product()`` is the
        dense ``(*batch, m, n)`` matrix.

    Raises:
        GeometryError: The vector has another shape than the point.
    """
    eta.require_at(point)
    return LoRAPoint(torch.cat([eta.B, point.B], -1), torch.cat([point.A, eta.A], -2))


def horizontal_lift(point: LoRAPoint, z: BaseVector) -> LoRATangent:
    r"""The horizontal vector over a change Z of X.

    .. math:: S = \tfrac12 B^+ Z A^+, \qquad \zeta_B = Z A^+ - B S, \qquad \zeta_A = B^+ Z - S A

    Then :math:`d\pi(\zeta) = P_U Z + Z P_V - P_U Z P_V`, which is Z itself if Z is tangent to the
    matrices of rank r at X, and its orthogonal projection onto them if not.

    Args:
        point: (B, A).
        z: Z, dense ``(*batch, m, n)`` or as a pair of any inner size with that product, as from
            :func:`project`; then the work is O((m + n) r²).

    Returns:
        A tangent vector in the dtype of the point.

    Raises:
        GeometryError: The rank of B A is below r, or Z has another shape than X.
    """
    require_base_vector(point, z)
    point.require_full_rank("The horizontal lift")
    q_b, r_b = thin_qr(point.B)
    q_a, r_a = thin_qr(point.A.mT)
    lower = r_a.mT
    zv, uz = right_apply(z, q_a), left_apply(q_b.mT, z)
    # In the orthonormal frames: U^T Z V, of which each side takes half.
    half = 0.5 * (uz @ q_a)
    zeta_b = torch.linalg.solve_triangular(lower, zv - q_b @ half, upper=False, left=False)
    zeta_a = torch.linalg.solve_triangular(r_b, uz - half @ q_a.mT, upper=True)
    return LoRATangent(zeta_b.to(point.dtype), zeta_a.to(point.dtype))
