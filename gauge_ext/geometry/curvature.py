"""The curvature of the connection: what a small loop does to a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.geometry.connection import horizontal
from gauge_ext.geometry.linalg import thin_qr, to_double
from gauge_ext.geometry.point import LoRAPoint, LoRATangent


def curvature(point: LoRAPoint, eta: LoRATangent, xi: LoRATangent) -> Tensor:
    r"""The curvature form of :func:`~gauge_ext.geometry.connection.connection_form` at s = 1/2.

    With the horizontal parts z of ``eta`` and x of ``xi`` and :math:`S_z = B^+ z_B`:

    .. math::
        \Omega(\eta, \xi) &= [S_z, S_x] - \tfrac12 (K_A - K_A^T)(A A^T)^{-1}
            - \tfrac12 (B^T B)^{-1} (K_B - K_B^T), \\
        K_A &= z_A (I - A^+ A) x_A^T, \qquad K_B = z_B^T (I - B B^+) x_B

    That is :math:`\Omega = d\omega - [\omega, \omega]`, with the sign of a left action. Its trace
    is 0, it vanishes for r = 1, and a frame carried round the parallelogram spanned by
    :math:`\epsilon z, \epsilon x` returns changed by :math:`I - \epsilon^2 \Omega(z, x)` up to
    :math:`O(\epsilon^3)`. At :math:`G \cdot (B, A)` it is :math:`G \Omega G^{-1}`.

    Args:
        point: (B, A).
        eta: A tangent vector at the point; vertical parts do not matter.
        xi: Another.

    Returns:
        ``(*batch, r, r)`` in the dtype of the point.

    Raises:
        GeometryError: The rank of B A is below r, or a vector has another shape.
    """
    point.require_full_rank("The curvature")
    exact = point.to(torch.float64)
    z, x = (horizontal(exact, vector.to(torch.float64)) for vector in (eta, xi))
    q_b, r_b = thin_qr(exact.B)
    q_a, r_a = thin_qr(exact.A.mT)
    s_z, s_x = (
        torch.linalg.solve_triangular(r_b, q_b.mT @ vector.B, upper=True) for vector in (z, x)
    )
    k_a = z.A @ (x.A - (x.A @ q_a) @ q_a.mT).mT
    k_b = z.B.mT @ (x.B - q_b @ (q_b.mT @ x.B))
    # A A^T = R_A^T R_A and B^T B = R_B^T R_B: two triangular solves each.
    turn_a = torch.linalg.solve_triangular(r_a, k_a - k_a.mT, upper=True, left=False)
    turn_a = torch.linalg.solve_triangular(r_a.mT, turn_a, upper=False, left=False)
    turn_b = torch.linalg.solve_triangular(r_b.mT, k_b - k_b.mT, upper=False)
    turn_b = torch.linalg.solve_triangular(r_b, turn_b, upper=True)
    omega = to_double(s_z @ s_x - s_x @ s_z).sub(turn_a + turn_b, alpha=0.5)
    return omega.to(point.dtype)
