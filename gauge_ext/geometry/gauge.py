"""Canonical gauges: one factor pair chosen from all the pairs that have the same product.

Every gauge here starts from the singular value decomposition of X = B A, which no change of gauge
touches, so a pair of condition 1e5 costs no more than the rounding with which it was stored. Only
``balanced`` also looks at the pair itself: it is the balanced pair nearest to the one given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import linalg
from gauge_ext.geometry.equal_energy import equal_energy_rotation
from gauge_ext.geometry.point import LoRAPoint

GaugeName = Literal["svd", "balanced", "equal_energy", "left", "pivot"]

#: The gauges that :func:`to_gauge` knows.
GAUGES: tuple[GaugeName, ...] = get_args(GaugeName)


@dataclass(frozen=True, eq=False)
class Gauged:
    """A point in a canonical gauge, and how it got there.

    Attributes:
        point: The new pair ``(B', A')``, in the dtype of the old one; ``B' A' = B A``.
        G: ``(*batch, r, r)`` in float64 with ``A' = G A`` and ``B' G = B`` on the column space of
            X. At full rank it is invertible and ``point`` is the old point's ``act(G)``; at a rank
            between 0 and r it is singular.
        pivots: For ``pivot``: ``(*batch, r)`` int64, the rows of B' that are the unit matrix, -1
            beyond the numerical rank; None for the other gauges.
    """

    point: LoRAPoint
    G: Tensor
    pivots: Tensor | None = None


@dataclass(frozen=True)
class _Spectral:
    """X = U diag(s) Vh, with zeros beyond the rank, and the frame of the pair in terms of U.

    Shapes: ``u (*, m, r)``, ``s (*, r)``, ``vh (*, r, n)``, ``live (*, r)`` bool: s counts as not
    zero, and ``frame = U^T B (*, r, r)``.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    live: Tensor
    frame: Tensor

    @property
    def root(self) -> Tensor:
        """diag(s)^(1/2) as ``(*, r)``; where, since the derivative of a root at 0 is infinite."""
        return torch.where(self.live, self.s, 1.0).sqrt() * self.live

    @property
    def g(self) -> Tensor:
        """The change of gauge to the svd gauge, ``S^(-1/2) U^T B``."""
        scale = torch.where(self.live, self.s, 1.0).rsqrt() * self.live
        return scale.unsqueeze(-1) * self.frame


_Pair = tuple[Tensor, Tensor, Tensor]


def to_gauge(point: LoRAPoint, name: GaugeName, *, pivots: Tensor | None = None) -> Gauged:
    r"""Change to a canonical gauge: ``(B', A') = (B G^-1, G A)`` with the same product X.

    With :math:`X = U \Sigma V^T`, r the rank of the pair and :math:`\|X\|_*` the sum of the
    singular values:

    * ``svd``: :math:`(U\Sigma^{1/2}, \Sigma^{1/2}V^T)`, the entry of largest modulus in each column
      of U positive. Unique if no singular value is repeated. For identity, pruning, mixed bits.
    * ``balanced``: :math:`G = ((AA^T)^{-1} \# B^TB)^{1/2}`, the symmetric positive definite one,
      with :math:`B'^TB' = A'A'^T`: the least :math:`\|B'\|^2 + \|A'\|^2 = 2\|X\|_*` of all gauges
      and, of all pairs that attain it, that with the old pair's orientation. Idempotent and
      O(r)-equivariant.
    * ``equal_energy``: :math:`(U\Sigma^{1/2}Q^T, Q\Sigma^{1/2}V^T)` with Q orthogonal and
      :math:`\|b_i\|^2 = \|a_i\|^2 = \|X\|_*/r` for all i: the least
      :func:`~gauge_ext.geometry.equal_energy.quantisation_factor`. Not unique.
    * ``left``: :math:`(U, \Sigma V^T)`. Unique if no singular value is repeated.
    * ``pivot``: :math:`(B B_p^{-1}, B_p A)` for r rows p: those rows of B' are the unit matrix and
      need not be stored, and the rows of A' are rows of X. Unique given p, which is chosen by
      pivoted orthogonalisation of the rows of U and so depends on X alone.

    All of them work on the numerical rank of X (in float64, for the factors as they are stored):
    ``balanced`` and ``equal_energy`` spread a lower rank over all r columns, the others leave
    the columns of B' and rows of A' beyond it zero. Where X is zero there is nothing to choose:
    the pair stays as it is, with G the unit matrix, so that an adapter before training (B = 0)
    keeps the A from which its training starts.

    O((m + n) r²), batched, computed in float64.

    Args:
        point: The pair; B is the effective factor, the scaling included.
        name: Which gauge, one of :data:`GAUGES`.
        pivots: For ``pivot``: the rows p, ``(*batch, r)`` or ``(r,)``, instead of chosen ones.

    Raises:
        ConfigError: The name is none of these, or ``pivots`` comes with another gauge.
        GeometryError: ``pivots`` has another shape, or those rows of B are linearly dependent.
        NonFiniteError: A factor holds NaN or infinity.

    Source:
        Balanced: Bhatia, Positive Definite Matrices, 2007, chapter 4 (geometric mean #).
    """
    if name not in GAUGES:
        raise ConfigError(f"gauge must be one of {', '.join(GAUGES)}, got {name!r}.")
    if pivots is not None and name != "pivot":
        raise ConfigError(f'pivots belong to the gauge "pivot", got gauge {name!r}.')
    if not bool(point.B.isfinite().all() and point.A.isfinite().all()):
        raise NonFiniteError("the factors hold NaN or infinity, so no gauge can be computed.")
    parts = _decompose(point)
    if name == "pivot":
        (b, a, g), pivots = _pivot(parts, pivots)
    else:
        b, a, g = _SPECTRAL_GAUGES[name](parts)
    nothing = ~parts.live.any(-1)[..., None, None]
    eye = torch.eye(point.rank, dtype=g.dtype, device=g.device)
    b = torch.where(nothing, point.B, b.to(point.dtype))
    a = torch.where(nothing, point.A, a.to(point.dtype))
    return Gauged(LoRAPoint(b, a), torch.where(nothing, eye, g), pivots)


def _decompose(point: LoRAPoint) -> _Spectral:
    u, s, vh = linalg.product_svd(point.B, point.A)
    # Of the pair as it is stored, so in float64: to a gauge, rounding of float32 is signal too,
    # and dropping what lies below it would not be lossless.
    rank = linalg.numerical_rank(s.detach(), *point.shape, torch.float64)
    missing = point.rank - s.shape[-1]
    if missing > 0:  # r exceeds a side of X
        u = torch.nn.functional.pad(u, (0, missing))
        s = torch.nn.functional.pad(s, (0, missing))
        vh = torch.nn.functional.pad(vh, (0, 0, 0, missing))
    live = torch.arange(point.rank, device=s.device) < rank.unsqueeze(-1)
    u, vh = u * live.unsqueeze(-2), vh * live.unsqueeze(-1)
    return _Spectral(u, s * live, vh, live, u.mT @ linalg.to_double(point.B))


def _svd(x: _Spectral) -> _Pair:
    return x.u * x.root.unsqueeze(-2), x.root.unsqueeze(-1) * x.vh, x.g


def _left(x: _Spectral) -> _Pair:
    return x.u, x.s.unsqueeze(-1) * x.vh, x.frame


def _balanced(x: _Spectral) -> _Pair:
    b, a, g = _svd(x)
    # Polar decomposition g = O P: the rotation takes the new frame back to the old orientation.
    w, _, zh = torch.linalg.svd(g)
    o = w @ zh
    return b @ o, o.mT @ a, o.mT @ g


def _equal_energy(x: _Spectral) -> _Pair:
    b, a, g = _svd(x)
    # A constant to autograd: no rotation changes the product, and this one jumps with the spectrum.
    q = equal_energy_rotation(x.s.detach())
    return b @ q.mT, q @ a, q @ g


_SPECTRAL_GAUGES: dict[str, Callable[[_Spectral], _Pair]] = {
    "svd": _svd,
    "left": _left,
    "balanced": _balanced,
    "equal_energy": _equal_energy,
}


def _pivot(x: _Spectral, given: Tensor | None) -> tuple[_Pair, Tensor]:
    m, r = x.u.shape[-2:]
    rows = _pivot_rows(x.u.detach()) if given is None else _checked(given, x)
    kept = rows.shape[-1]
    picked = x.u.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, r))  # (*, kept, r)
    picked = torch.nn.functional.pad(picked, (0, 0, 0, r - kept))
    # Beyond the rank the columns are zero; a unit block there makes the square invertible.
    both = x.live.unsqueeze(-1) & x.live.unsqueeze(-2)
    eye = torch.eye(r, dtype=picked.dtype, device=picked.device)
    square = torch.where(both, picked, eye)
    b, info = torch.linalg.solve_ex(square, x.u, left=False)
    largest = b.detach().abs().amax((-2, -1))
    if bool(info.any()) or not bool((largest < 1 / torch.finfo(b.dtype).eps / m).all()):
        raise GeometryError(
            "the rows of B at the given pivots are linearly dependent.",
            hint="Leave pivots out to have them chosen.",
        )
    # The unit rows exactly, since they are the ones that need not be stored.
    index = rows.unsqueeze(-1).expand(*rows.shape, r)
    unit = torch.where(x.live[..., :kept].unsqueeze(-1), eye[:kept], b.gather(-2, index))
    b = b.scatter(-2, index, unit)
    change = torch.where(both, picked, 0.0)
    pair = (b, change @ (x.s.unsqueeze(-1) * x.vh), change @ x.frame)
    rows = torch.nn.functional.pad(rows, (0, r - kept), value=-1)
    return pair, torch.where(x.live, rows, -1)


def _checked(given: Tensor, x: _Spectral) -> Tensor:
    m, r = x.u.shape[-2:]
    batch = x.u.shape[:-2]
    fits = given.shape in ((*batch, r), (r,)) and not given.is_floating_point()
    if not fits or not bool(((given >= 0) & (given < m)).all()):
        raise GeometryError(
            f"pivots must be whole numbers from 0 to {m - 1} of shape {(*batch, r)}, got "
            f"{given.dtype} of shape {tuple(given.shape)}."
        )
    if not bool(x.live.all()):
        raise GeometryError(
            "pivots were given for a pair whose product has a rank below r.",
            hint="Leave pivots out to have as many chosen as the rank allows.",
        )
    return given.to(x.u.device, torch.int64).expand(*batch, r)


def _pivot_rows(u: Tensor) -> Tensor:
    """Choose min(m, r) rows of U by greatest norm, each time orthogonal to those chosen before.

    The pivoted QR of U^T (Businger and Golub, 1965). Norms and angles of U's rows are those of
    the projector U U^T, so the choice depends on the column space alone.
    """
    m, r = u.shape[-2:]
    rest = u
    taken = torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)
    rows = []
    for _ in range(min(m, r)):
        row = rest.square().sum(-1).masked_fill(taken, -1.0).argmax(-1, keepdim=True)  # (*, 1)
        rows.append(row)
        taken = taken.scatter(-1, row, torch.ones_like(row, dtype=torch.bool))
        vector = rest.gather(-2, row.unsqueeze(-1).expand(*row.shape, r))  # (*, 1, r)
        vector = torch.nn.functional.normalize(vector, dim=-1)
        rest = rest - (rest @ vector.mT) @ vector
    return torch.cat(rows, -1)
