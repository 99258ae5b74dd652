r"""Parallel transport along paths of which only nodes are known, each in a gauge of its own.

A path of checkpoints gives factor pairs, and each may have been factorized independently. The
*link* between neighbours is the matrix that brings the later frame into the gauge of the earlier
one, without choosing a gauge for either. Products of links are transport; round a loop they are
holonomy, whose eigenvalues are numbers that no change of gauge at any node changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.linalg import product_svd, sqrtm, to_double
from gauge_ext.geometry.point import LoRAPoint

MIN_OVERLAP = 0.1
"""Below this :func:`overlap` a link is refused; steps of one training run have about 0.5."""

_TOO_FAR = (
    "Two points this far apart are not neighbours on a path, and any frame for one made from the "
    "other would be arbitrary. Take more checkpoints between them, or combine the adapters through "
    "their updates instead of their factors."
)


@dataclass(frozen=True)
class _Frame:
    """A point seen from its svd gauge: (B, A) = G · (u √s, √s vh)."""

    u: Tensor
    s: Tensor
    vh: Tensor
    gauge: Tensor
    """G = A V s^-½, (*, r, r)."""
    inverse: Tensor
    """G^-1 = s^-½ Uᵀ B, found without inverting G."""

    @classmethod
    def of(cls, point: LoRAPoint) -> _Frame:
        point.require_full_rank("A link")
        u, s, vh = product_svd(point.B, point.A)
        root = s.sqrt()
        gauge = to_double(point.A) @ (vh.mT / root.unsqueeze(-2))
        inverse = (u.mT / root.unsqueeze(-1)) @ to_double(point.B)
        return cls(u, s, vh, gauge, inverse)

    def overlap(self, other: _Frame) -> Tensor:
        """The product of the least cosines between the column spaces and the row spaces."""
        columns: Tensor = torch.linalg.svdvals(self.u.mT @ other.u)[..., -1]
        rows: Tensor = torch.linalg.svdvals(self.vh @ other.vh.mT)[..., -1]
        return torch.mul(columns, rows)

    def link(self, other: _Frame, min_overlap: float) -> Tensor:
        """The link between the two svd gauges, in which every square root is tame."""
        overlap = self.overlap(other)
        if bool((overlap < min_overlap).any()):
            raise GeometryError(
                f"the overlap of two points is {float(overlap.detach().min()):.3g}, and a link "
                f"needs at least {min_overlap:.3g}.",
                hint=_TOO_FAR,
            )
        try:
            left = _one_sided(self, other)
            right = torch.linalg.inv(_one_sided(other, self))
            # The geometric mean of the two: reversible, hence of second order.
            mean: Tensor = left @ sqrtm(torch.linalg.solve(left, right))
        except GeometryError as error:
            raise GeometryError(
                "two points have no link: " + error.message, hint=_TOO_FAR
            ) from error
        return mean


def _one_sided(here: _Frame, there: _Frame) -> Tensor:
    """The solution N^-1 (N M)^½ of G N G = M, with M = B0^+ B1 and N = A1 A0^+."""
    root0, root1 = here.s.sqrt(), there.s.sqrt()
    m = (here.u.mT @ there.u) * root1.unsqueeze(-2) / root0.unsqueeze(-1)
    n = (there.vh @ here.vh.mT) * root1.unsqueeze(-1) / root0.unsqueeze(-2)
    solution: Tensor = torch.linalg.solve(n, sqrtm(n @ m))
    return solution


def _require_same_shape(path: Sequence[LoRAPoint]) -> None:
    first = path[0]
    for index, point in enumerate(path):
        if point.B.shape != first.B.shape or point.A.shape != first.A.shape:
            raise GeometryError(
                "all points of a path need one shape, one rank and one batch shape; point 0 has "
                f"B {tuple(first.B.shape)} and A {tuple(first.A.shape)}, point {index} "
                f"{tuple(point.B.shape)} and {tuple(point.A.shape)}."
            )


def overlap(start: LoRAPoint, end: LoRAPoint) -> Tensor:
    r"""How far two points are from being neighbours, in [0, 1].

    .. math:: \sigma_{\min}(U_0^T U_1)\; \sigma_{\min}(V_0^T V_1)

    the product of the cosines of the largest principal angles between the column spaces and
    between the row spaces. 1 for equal spaces; about 0 for adapters that were not trained from one
    another, however alike their tasks.

    Args:
        start: (B0, A0) in any gauge.
        end: (B1, A1) in any gauge, of the same shape and rank.

    Returns:
        ``(*batch)`` in float64.

    Raises:
        GeometryError: The rank of a product is below r, or the shapes differ.
    """
    _require_same_shape((start, end))
    return _Frame.of(start).overlap(_Frame.of(end))


def is_admissible(start: LoRAPoint, end: LoRAPoint, *, min_overlap: float = MIN_OVERLAP) -> Tensor:
    """Whether :func:`overlap` is large enough for a link, ``(*batch)`` of bools.

    Raises:
        GeometryError: The rank of a product is below r, or the shapes differ.
    """
    return overlap(start, end) >= min_overlap


def link(start: LoRAPoint, end: LoRAPoint, *, min_overlap: float = MIN_OVERLAP) -> Tensor:
    r"""The transport between neighbours: ``end.act(U)`` continues the frame of ``start``.

    With :math:`M = B_0^+ B_1` and :math:`N = A_1 A_0^+`,

    .. math:: U_L = N^{-1} (N M)^{1/2}, \qquad U_R = U_L(1 \to 0)^{-1}, \qquad
        U = U_L (U_L^{-1} U_R)^{1/2}

    and so U is covariant, :math:`U(G_0 p_0, G_1 p_1) = G_0\, U\, G_1^{-1}`; reversible,
    :math:`U(p_1, p_0) = U(p_0, p_1)^{-1}`; :math:`U(p, G p) = G^{-1}`; of second order along a
    smooth path; and :math:`|\det U| = \bigl(\det B_1^T B_1 \det A_0 A_0^T \,/\, \det B_0^T B_0
    \det A_1 A_1^T\bigr)^{1/4}` exactly. All of it is computed between the svd gauges of the two
    updates, where the square roots are of r x r matrices whose condition no gauge can spoil, only
    that of X itself: up to :math:`\sigma_1 / \sigma_r` of about 1e7. O((m + n) r²).

    Args:
        start: (B0, A0) in any gauge.
        end: (B1, A1) in any gauge, of the same shape and rank.
        min_overlap: The least :func:`overlap` that is accepted.

    Returns:
        U, ``(*batch, r, r)``, in the dtype of ``start``.

    Raises:
        GeometryError: The rank of a product is below r, the shapes differ, or the points are too
            far apart.
    """
    _require_same_shape((start, end))
    first, last = _Frame.of(start), _Frame.of(end)
    inner = first.link(last, min_overlap)
    return (first.gauge @ inner @ last.inverse).to(start.dtype)


def transport(path: Sequence[LoRAPoint], *, min_overlap: float = MIN_OVERLAP) -> list[LoRAPoint]:
    r"""Carry the frame of the first point along a path of updates.

    .. math:: p'_0 = p_0, \qquad p'_{k+1} = U(p'_k, p_{k+1}) \cdot p_{k+1}

    The updates :math:`B_k A_k` stay what they are; the gauges of all points but the first do not
    matter. The result converges to the horizontal lift of the path, with the square of the step.

    Args:
        path: Points of one shape and rank, at least one.
        min_overlap: The least :func:`overlap` of neighbours that is accepted.

    Returns:
        As many points, each in the dtype of its own.

    Raises:
        GeometryError: The path is empty, a rank is below r, the shapes differ, or two neighbours
            are too far apart.
    """
    if not path:
        raise GeometryError("a path needs at least one point, got none.")
    _require_same_shape(path)
    frame = _Frame.of(path[0])
    start = frame
    carried = torch.eye(path[0].rank, dtype=frame.s.dtype, device=frame.s.device)
    moved = [path[0]]
    for point in path[1:]:
        following = _Frame.of(point)
        # Between svd gauges throughout, so that the gauges of the nodes add no rounding.
        carried = carried @ frame.link(following, min_overlap)
        frame = following
        root = frame.s.sqrt()
        b = torch.linalg.solve(carried, frame.u * root.unsqueeze(-2), left=False)
        a = carried @ (root.unsqueeze(-1) * frame.vh)
        moved.append(
            LoRAPoint((b @ start.inverse).to(point.dtype), (start.gauge @ a).to(point.dtype))
        )
    return moved


def holonomy(loop: Sequence[LoRAPoint], *, min_overlap: float = MIN_OVERLAP) -> Tensor:
    r"""What a loop does to a frame carried round it: :math:`H = U_{01} U_{12} \cdots U_{N0}`.

    The last point is linked to the first; the loop may name the first again at its end, in any
    gauge. H turns into :math:`G_0 H G_0^{-1}` with the gauge of the first point and into nothing
    else, so its eigenvalues are invariants of the loop of updates. :math:`\det H = \pm 1`, and H
    is :math:`\pm 1` for r = 1; the eigenvalues need not have modulus 1, for GL(r) is not compact.

    Args:
        loop: Points of one shape and rank, at least one.
        min_overlap: The least :func:`overlap` of neighbours that is accepted.

    Returns:
        H, ``(*batch, r, r)``, in the dtype of the first point.

    Raises:
        GeometryError: The loop is empty, a rank is below r, the shapes differ, or two neighbours
            are too far apart.
    """
    if not loop:
        raise GeometryError("a loop needs at least one point, got none.")
    _require_same_shape(loop)
    first = frame = _Frame.of(loop[0])
    carried = torch.eye(loop[0].rank, dtype=frame.s.dtype, device=frame.s.device)
    for point in loop[1:]:
        following = _Frame.of(point)
        carried = carried @ frame.link(following, min_overlap)
        frame = following
    carried = carried @ frame.link(first, min_overlap)
    return (first.gauge @ carried @ first.inverse).to(loop[0].dtype)
