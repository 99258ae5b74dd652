"""The matrix algebra of thin factors: batched, in float64, on the device of the input.

Every function takes any floating dtype and returns float64, so that a chain of them rounds once,
at its end. No function forms an m x n product or inverts a Gram matrix: a Gram matrix has the
square of the condition of its factor, and a gauge of condition 1e5 would leave no digit in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError

# Scaled Denman-Beavers steps for a matrix of condition 1e16: about 10. More do not help.
_MAX_SQRT_STEPS = 40


def to_double(x: Tensor) -> Tensor:
    """Return ``x`` in float64, the dtype in which all of this package's geometry is computed."""
    return x.to(torch.float64)


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor :math:`x = Q R` with orthonormal columns in Q and a diagonal of R that is >= 0.

    Householder QR leaves the signs of the diagonal to the implementation; here they are fixed, so
    the factors of a matrix of full column rank are unique (Golub and Van Loan, theorem 5.2.3).

    Args:
        x: ``(*, m, r)``.

    Returns:
        Q ``(*, m, k)`` and R ``(*, k, r)`` upper triangular, with ``k = min(m, r)``, in float64.
    """
    q, r = torch.linalg.qr(to_double(x))
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(r.dtype)
    return q * sign.unsqueeze(-2), r * sign.unsqueeze(-1)


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compute the thin singular value decomposition of :math:`B A` without forming it.

    .. math:: B = Q_B R_B, \quad A^T = Q_A R_A, \quad R_B R_A^T = \hat U S \hat V^T
        \quad\Rightarrow\quad BA = (Q_B \hat U)\, S\, (Q_A \hat V)^T

    O((m + n) r²). The signs are fixed: the entry of largest modulus in each column of U is > 0.

    Args:
        b: B, ``(*, m, r)``.
        a: A, ``(*, r, n)``.

    Returns:
        U ``(*, m, k)``, S ``(*, k)`` descending and Vh ``(*, k, n)`` in float64, with
        ``k = min(m, r, n)``: r wherever the rank does not exceed a side.
    """
    q_b, r_b = thin_qr(b)
    q_a, r_a = thin_qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, vh = q_b @ u, vh @ q_a.mT
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))  # (*, 1, k)
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vh * sign.mT


def product_singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return ``(*, min(m, r, n))`` singular values of B A, descending, in float64.

    Those of :func:`product_svd`, without its vectors.
    """
    r_b = torch.linalg.qr(to_double(b), mode="r").R
    r_a = torch.linalg.qr(to_double(a).mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.mT)
    return values


def rank_threshold(s: Tensor, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The value ``(*)`` up to which a singular value counts as zero: ``s_1 * max(m, n) * eps``.

    That of ``torch.linalg.matrix_rank`` in the precision in which this package accumulates an
    update: float64 for float64 factors and float32 for all others. It depends on the product
    alone and on no gauge, which no threshold on a single factor does.

    Args:
        s: ``(*, k)`` singular values, descending.
        m: Rows of the matrix.
        n: Columns of the matrix.
        dtype: The dtype in which the factors were stored.
    """
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if s.shape[-1] == 0:
        return s.new_zeros(s.shape[:-1])
    return s[..., 0].mul(max(m, n) * eps)


def numerical_rank(s: Tensor, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Count the singular values above :func:`rank_threshold`, which see for the arguments.

    Returns:
        ``(*)`` in int64; 0 for a matrix of zeros.
    """
    return torch.gt(s, rank_threshold(s, m, n, dtype).unsqueeze(-1)).sum(-1)


def left_inverse_apply(b: Tensor, y: Tensor) -> Tensor:
    r"""Compute :math:`B^+ Y = R^{-1} Q^T Y` from :math:`B = Q R`.

    Args:
        b: ``(*, m, r)`` of full column rank, for which the caller answers; m >= r.
        y: ``(*, m, k)``.

    Returns:
        ``(*, r, k)`` in float64.
    """
    q, r = torch.linalg.qr(to_double(b))
    solution: Tensor = torch.linalg.solve_triangular(r, q.mT @ to_double(y), upper=True)
    return solution


def right_inverse_apply(y: Tensor, a: Tensor) -> Tensor:
    r"""Compute :math:`Y A^+ = Y Q R^{-T}` from :math:`A^T = Q R`.

    Args:
        y: ``(*, k, n)``.
        a: ``(*, r, n)`` of full row rank, for which the caller answers; n >= r.

    Returns:
        ``(*, k, r)`` in float64.
    """
    return left_inverse_apply(a.mT, y.mT).mT


def sqrtm(x: Tensor) -> Tensor:
    r"""Compute principal square roots by the product form of the Denman-Beavers iteration.

    .. math::
        M_{k+1} &= \tfrac12 \bigl(I + \tfrac12 (\mu^2 M_k + \mu^{-2} M_k^{-1})\bigr), \\
        X_{k+1} &= \tfrac12\, \mu X_k (I + \mu^{-2} M_k^{-1}),
        \qquad M_0 = X_0 = x, \quad \mu = |\det M_k|^{-1/2r}

    until M = I (Higham, Functions of Matrices, 2008, equation 6.29 and section 6.5). The root is
    the one whose eigenvalues have positive real parts; it exists and is unique if no eigenvalue of
    ``x`` is real and <= 0, and it is covariant: ``sqrtm(G x G^-1) = G sqrtm(x) G^-1``.

    Args:
        x: ``(*, r, r)``.

    Returns:
        ``(*, r, r)`` in float64.

    Raises:
        GeometryError: An eigenvalue is zero or negative, so that no principal root exists.
    """
    root: Tensor = to_double(x)
    product: Tensor = root
    size = root.shape[-1]
    eye = torch.eye(size, dtype=root.dtype, device=root.device)
    tolerance = 4 * size * torch.finfo(root.dtype).eps
    gap = float("inf")
    for _ in range(_MAX_SQRT_STEPS):
        inverse, info = torch.linalg.inv_ex(product)
        if bool(info.any()):
            break
        # Near the end scaling only adds rounding; it has done its work by then.
        if gap > 1e-2:
            scale = torch.linalg.slogdet(product).logabsdet.div(-2 * size).exp()
            scale = scale[..., None, None]
        else:
            scale = torch.ones((), dtype=root.dtype, device=root.device)
        inverse = inverse / scale.square()
        root = (root + root @ inverse).mul(0.5 * scale)
        product = (scale.square() * product + inverse).mul(0.5).add(eye).mul(0.5)
        last, gap = gap, _largest(product - eye)
        # Quadratic until the floor of rounding, where it stops falling.
        if gap <= tolerance or (gap <= 1e-8 and gap >= 0.5 * last):
            return root
        if gap != gap:
            break
    raise GeometryError(
        "a matrix has no principal square root: an eigenvalue of it is zero or negative, "
        "or too close to that to tell."
    )


def _largest(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.detach()).max()) if x.numel() else 0.0


def sym_pow(p: Tensor, power: float) -> Tensor:
    r"""Raise symmetric positive definite matrices to a real power: :math:`Q \Lambda^p Q^T`.

    Args:
        p: ``(*, r, r)``; its symmetric part is used.
        power: Any real number; negative ones invert.

    Returns:
        ``(*, r, r)`` in float64, symmetric.

    Raises:
        GeometryError: A matrix is not positive definite.
    """
    p = to_double(p)
    values, vectors = torch.linalg.eigh(0.5 * (p + p.mT))
    if bool((values <= 0).any()):
        raise GeometryError(
            f"a power of {power} was asked of a symmetric matrix that is not positive definite; "
            f"its smallest eigenvalue is {float(values.detach().min()):.3g}."
        )
    return torch.matmul(vectors * values.pow(power).unsqueeze(-2), vectors.mT)
