"""Points of the bundle of factor pairs, and tangent vectors at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import linalg


class FactoredLayer(Protocol):
    """What :meth:`LoRAPoint.from_layer` reads; a :class:`~gauge_ext.LoRALinear` has it."""

    @property
    def lora_A(self) -> Tensor:
        """A, ``(r, in)``."""

    @property
    def lora_B(self) -> Tensor:
        """The stored factor, ``(out, r)``, without the scaling."""

    @property
    def scaling(self) -> float:
        """The scaling s."""


def _check_pair(kind: str, b: Tensor, a: Tensor) -> None:
    if (
        b.ndim < 2
        or a.ndim != b.ndim
        or b.shape[-1] != a.shape[-2]
        or b.shape[:-2] != a.shape[:-2]
        or 0 in b.shape[-2:]
        or 0 in a.shape[-2:]
    ):
        raise GeometryError(
            f"a {kind} needs B (*batch, m, r) and A (*batch, r, n) with one batch shape, one r and "
            f"no empty side, got {tuple(b.shape)} and {tuple(a.shape)}."
        )
    if not b.dtype.is_floating_point or a.dtype != b.dtype or a.device != b.device:
        raise GeometryError(
            f"the factors of a {kind} need one floating dtype and one device, got "
            f"{b.dtype} on {b.device} and {a.dtype} on {a.device}."
        )


@dataclass(frozen=True, eq=False)
class LoRAPoint:
    r"""A factor pair (B, A), or a batch of them, standing for the update :math:`X = B A`.

    B is the *effective* factor: the layer's scaling times its lora_B. Pairs of full rank are the
    total space E of a principal GL(r)-bundle over the matrices of rank r; the group acts by
    :meth:`act` and X is what it leaves alone. A pair of lower rank is allowed here, since B = 0 is
    how training starts; what is undefined at one raises when asked.

    Matrices computed from a point come back in its dtype, numbers (singular values, distances, the
    metric) in float64; all of it is computed in float64, and differentiably.

    Args:
        B: ``(*batch, m, r)``.
        A: ``(*batch, r, n)``, of the same dtype, device and batch shape.

    Raises:
        GeometryError: The shapes, dtypes or devices do not fit.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        _check_pair("LoRAPoint", self.B, self.A)

    @classmethod
    def from_layer(cls, layer: FactoredLayer) -> LoRAPoint:
        """Take a snapshot of a layer's adapter: ``(scaling * lora_B, lora_A)``, detached copies.

        Half precision is raised to float32, since the scaled factor would not fit into it.

        Args:
            layer: A :class:`~gauge_ext.LoRALinear`, or anything with its three attributes.
        """
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return cls((linalg.to_double(b) * layer.scaling).to(dtype), a.to(dtype, copy=True))

    @property
    def rank(self) -> int:
        """r, the inner size of the pair; :meth:`numerical_rank` may be less."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of X."""
        return self.B.shape[-2], self.A.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions, of which there may be none."""
        return self.B.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.B.device

    def product(self) -> Tensor:
        """Form X = B A ``(*batch, m, n)``; nothing else in this package does."""
        return (linalg.to_double(self.B) @ linalg.to_double(self.A)).to(self.dtype)

    def act(self, g: Tensor) -> LoRAPoint:
        r"""Change the gauge: :math:`G \cdot (B, A) = (B G^{-1}, G A)`, which leaves X alone.

        Args:
            g: G, ``(*batch, r, r)`` or one ``(r, r)`` for all, invertible.

        Raises:
            GeometryError: G has another shape or is singular.
        """
        return LoRAPoint(*_act(self.B, self.A, g))

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LoRAPoint:
        """Return the point in another dtype or on another device; None keeps the own one."""
        return LoRAPoint(
            self.B.to(device or self.device, dtype or self.dtype),
            self.A.to(device or self.device, dtype or self.dtype),
        )

    def singular_values(self) -> Tensor:
        """The singular values of X, ``(*batch, min(m, r, n))`` descending, in float64."""
        return linalg.product_singular_values(self.B, self.A)

    def numerical_rank(self) -> Tensor:
        """The rank of X to the precision of the factors, ``(*batch)`` in int64.

        See :func:`~gauge_ext.geometry.linalg.rank_threshold`: the same in every gauge.
        """
        return linalg.numerical_rank(self.singular_values().detach(), *self.shape, self.dtype)

    def require_full_rank(self, what: str) -> None:
        """Refuse a point at which the fibre is not a copy of GL(r).

        Args:
            what: What is undefined there, to begin the message with: "The connection".

        Raises:
            GeometryError: X has a rank below r, so that B or A has none to invert.
        """
        rank = self.numerical_rank()
        if bool((rank < self.rank).any()):
            where = ""
            if rank.ndim:
                first = [int(i) for i in (rank < self.rank).nonzero()[0]]
                where = f" at batch index {first}"
                rank = rank[tuple(first)]
            raise GeometryError(
                f"{what} is undefined at a rank-deficient point: the product of the factors has "
                f"rank {int(rank)}{where}, and r is {self.rank}.",
                hint="Compress the adapter to its numerical rank first; a B of zeros, as before "
                "training, has no fibre at all.",
            )


@dataclass(frozen=True, eq=False)
class LoRATangent:
    r"""A tangent vector :math:`\eta = (\eta_B, \eta_A)` at a point of the total space.

    Tangent vectors at one point form a vector space: ``+``, ``-`` and products with numbers, or
    with a tensor that broadcasts against both factors. The group moves them by :meth:`act` to the
    moved point.

    Args:
        B: eta_B, ``(*batch, m, r)``.
        A: eta_A, ``(*batch, r, n)``.

    Raises:
        GeometryError: The shapes, dtypes or devices do not fit.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        _check_pair("LoRATangent", self.B, self.A)

    def __add__(self, other: LoRATangent) -> LoRATangent:
        return LoRATangent(self.B + other.B, self.A + other.A)

    def __sub__(self, other: LoRATangent) -> LoRATangent:
        return LoRATangent(self.B - other.B, self.A - other.A)

    def __mul__(self, factor: float | Tensor) -> LoRATangent:
        return LoRATangent(self.B * factor, self.A * factor)

    __rmul__ = __mul__

    def __neg__(self) -> LoRATangent:
        return LoRATangent(-self.B, -self.A)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.B.dtype

    def act(self, g: Tensor) -> LoRATangent:
        r"""Push forward to the point ``point.act(g)``: :math:`(\eta_B G^{-1}, G \eta_A)`.

        Args:
            g: G, ``(*batch, r, r)`` or one ``(r, r)`` for all, invertible.

        Raises:
            GeometryError: G has another shape or is singular.
        """
        return LoRATangent(*_act(self.B, self.A, g))

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LoRATangent:
        """Return the vector in another dtype or on another device; None keeps the own one."""
        return LoRATangent(
            self.B.to(device or self.B.device, dtype or self.dtype),
            self.A.to(device or self.A.device, dtype or self.dtype),
        )

    def require_at(self, point: LoRAPoint) -> None:
        """Refuse to be taken for a tangent vector at a point of another shape.

        Raises:
            GeometryError: The shapes of the factors differ from those of the point.
        """
        if self.B.shape != point.B.shape or self.A.shape != point.A.shape:
            raise GeometryError(
                f"a tangent vector at a point with B {tuple(point.B.shape)} and "
                f"A {tuple(point.A.shape)} has factors of those shapes, got "
                f"{tuple(self.B.shape)} and {tuple(self.A.shape)}."
            )


def _act(b: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(B G^-1, G A) in the dtype of the factors, computed in float64."""
    rank, batch = a.shape[-2], a.shape[:-2]
    if g.shape[-2:] != (rank, rank) or g.shape[:-2] not in (batch, torch.Size()):
        raise GeometryError(
            f"a gauge must have shape {(*batch, rank, rank)} or {(rank, rank)}, "
            f"got {tuple(g.shape)}."
        )
    double = linalg.to_double(g).expand(*batch, rank, rank)
    moved, info = torch.linalg.solve_ex(double, linalg.to_double(b), left=False)
    if bool(info.any()):
        raise GeometryError("a gauge must be invertible, and this one is singular.")
    return moved.to(b.dtype), (double @ linalg.to_double(a)).to(a.dtype)
