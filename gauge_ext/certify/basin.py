"""A basin of convergence, for quadratic objectives alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.linalg import product_singular_values, to_double

RADIUS = 0.1
"""Of the smallest singular value of the minimizer: the theorem's basin."""
MAX_STEP = 2 / 3
"""The largest step size of the theorem."""
_DISTANCE_FACTOR = math.sqrt(math.sqrt(2) + 1)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class BasinCertificate:
    r"""Whether ScaledGD is proven to converge from a point, and if not, why.

    Attributes:
        certified: Whether it is proven.
        reason: Why it is not; None where it is.
        error: :math:`\|(X - X_*) C^{1/2}\|_F`.
        radius: What :attr:`distance_bound` has to stay within: a lower bound of
            :math:`0.1\,\sigma_r(X_* C^{1/2})`.
        distance_bound: An upper bound of the distance of the factors from those of the minimizer.
        max_step: The largest step size that the theorem covers.
    """

    certified: bool
    reason: str | None
    error: float
    radius: float
    distance_bound: float
    max_step: float = MAX_STEP

    def rate(self, lr: float) -> float:
        r"""Return the factor by which each step shrinks the distance, :math:`1 - 0.7\,\eta`.

        Args:
            lr: The step size :math:`\eta` in the coordinates :math:`(B, A C^{1/2})`. On the plain
                factors, a step of :math:`\eta / c` is the same one where C is c times the unit
                matrix; for any other C nothing is proven of them.

        Raises:
            GeometryError: There is no certificate, or it does not cover this step size.
        """
        if not self.certified:
            raise GeometryError(f"there is no certificate: {self.reason}.")
        if not 0 < lr <= self.max_step:
            raise GeometryError(f"lr must lie in (0, 2/3], got {lr}.")
        return 1 - 0.7 * lr


def certify_basin(
    point: LoRAPoint, gradient: Tensor, curvature: float | Tensor
) -> BasinCertificate:
    r"""Check whether a point lies in the basin of ScaledGD for a quadratic objective.

    For :math:`f(X) = \tfrac12 \mathrm{tr}\,(X - X_*)\,C\,(X - X_*)^T + \text{const}` with C
    positive definite and :math:`X_*` of rank r, such as least squares on inputs with second
    moments C that a matrix of rank r fits exactly. In the coordinates
    :math:`\tilde X = X C^{1/2}` this is matrix factorization, for which Tong, Ma and Chi
    (arXiv:2005.08898) prove: from :math:`\mathrm{dist} \le 0.1\,\sigma_r(\tilde X_*)` each step
    of ScaledGD with :math:`0 < \eta \le 2/3` shrinks dist by :math:`1 - 0.7\,\eta` (proven anew,
    with these constants, in ``docs/math.md``, 3.10). With
    :math:`e = \|\tilde X - \tilde X_*\|_F = \|G C^{-1/2}\|_F`,
    :math:`\mathrm{dist} \le (\sqrt2 + 1)^{1/2} e` and
    :math:`\sigma_r(\tilde X_*) \ge \sigma_r(\tilde X) - e`, so

    .. math:: (\sqrt2 + 1)^{1/2}\, e \le 0.1\,(\sigma_r(\tilde X) - e)

    is enough. It is proven for ScaledGD on the factors :math:`(B, A C^{1/2})`, not on (B, A) (see
    :meth:`BasinCertificate.rate`), in every gauge, with no damping, momentum or decay, in exact
    arithmetic; that the objective *is* quadratic is for the caller to
    know. Nothing of the kind is known for the loss of a network.

    Args:
        point: (B, A).
        gradient: :math:`G = \nabla_X f`, dense ``(m, n)``.
        curvature: C ``(n, n)``; or a number for that multiple of the unit matrix.

    Returns:
        The certificate, or the reason why there is none.

    Raises:
        GeometryError: The shapes do not fit, or C is not symmetric.
    """
    m, n = point.shape
    if point.batch_shape or gradient.shape != (m, n):
        raise GeometryError(
            f"a certificate needs one point and a gradient of shape {(m, n)}, got a batch of shape "
            f"{tuple(point.batch_shape)} and {tuple(gradient.shape)}."
        )
    c = _second_moments(curvature, n, gradient)
    b, a, g = to_double(point.B), to_double(point.A), to_double(gradient)
    if not all(bool(part.isfinite().all()) for part in (b, a, g, c)):
        return _refused("a factor, the gradient or the curvature holds NaN or infinity")
    values, vectors = torch.linalg.eigh(c)
    if not float(values[0]) > _ROUNDING * float(values[-1]):
        return _refused(
            f"the curvature is not positive definite: its eigenvalues reach from "
            f"{float(values[0]):.3g} to {float(values[-1]):.3g}"
        )
    root = (vectors * values.sqrt()) @ vectors.mT
    inverse_root = (vectors / values.sqrt()) @ vectors.mT
    difference = g @ inverse_root
    error = float(torch.linalg.matrix_norm(difference))
    r = point.rank
    sigma = product_singular_values(b, a @ root)
    least = float(sigma[r - 1]) if r <= len(sigma) else 0.0
    radius, bound = RADIUS * (least - error), _DISTANCE_FACTOR * error
    if not least > 0:
        return _refused("the rank of X is below r", error, radius, bound)
    target = torch.linalg.svdvals(b @ (a @ root) - difference)
    scale = float(target[0])
    if r < len(target) and float(target[r]) > _ROUNDING * scale:
        return _refused(
            "the minimizer has singular values beyond the r-th, the largest "
            f"{float(target[r]):.3g}, and the theorem is about a minimizer of rank r",
            *(error, radius, bound),
        )
    if not bound * (1 + _ROUNDING) <= radius:
        return _refused(
            f"the distance from the minimizer is only known to be below {bound:.3g}, and the basin "
            f"is only known to reach to {radius:.3g}",
            *(error, radius, bound),
        )
    return BasinCertificate(True, None, error, radius, bound)


def _second_moments(curvature: float | Tensor, n: int, like: Tensor) -> Tensor:
    if not isinstance(curvature, Tensor):
        return curvature * torch.eye(n, dtype=torch.float64, device=like.device)
    if curvature.shape != (n, n):
        raise GeometryError(f"curvature must have shape {(n, n)}, got {tuple(curvature.shape)}.")
    c = to_double(curvature)
    if bool(((c - c.mT).abs() > 1e-6 * c.abs().max()).any()):
        raise GeometryError("curvature must be symmetric, and this one is not.")
    return torch.mul(c + c.mT, 0.5)


def _refused(
    reason: str, error: float = math.nan, radius: float = math.nan, bound: float = math.nan
) -> BasinCertificate:
    return BasinCertificate(False, reason, error, radius, bound)
