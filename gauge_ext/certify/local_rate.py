"""The rate of ScaledGD near a stationary point, from the Hessian against the metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import GeometryError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.linalg import thin_qr, to_double
from gauge_ext.optim.pairs import FactorPair


@dataclass(frozen=True)
class LocalRate:
    r"""How fast ScaledGD converges in some neighbourhood of a stationary point.

    Attributes:
        certified: Whether the rate is that of the linearized iteration, up to rounding. Then there
            is a neighbourhood, of a size that is not known, in which ScaledGD converges so.
        reason: Why it is only an estimate, or nothing at all; None where it is certified.
        smallest: The smallest eigenvalue of the pencil (Hessian, metric) that was found; NaN where
            none was looked for.
        largest: The largest.
        gradient_norm: The length of the gradient in the dual of the metric.
        steps: Hessian-vector products used.
    """

    certified: bool
    reason: str | None
    smallest: float
    largest: float
    gradient_norm: float
    steps: int

    @property
    def best_lr(self) -> float:
        r"""The step size with the best rate, :math:`2 / (\lambda_1 + \lambda_n)`."""
        return 2 / (self.smallest + self.largest)

    def rate(self, lr: float) -> float:
        r"""Return :math:`\max |1 - \eta\lambda|`, by which each step shrinks the distance at last.

        Args:
            lr: The step size :math:`\eta`.

        Raises:
            GeometryError: There is no estimate, or the point is no minimum.
        """
        if not self.smallest > 0:
            raise GeometryError(f"there is no rate: {self.reason}.")
        return max(abs(1 - lr * self.smallest), abs(1 - lr * self.largest))


def local_rate(
    loss: Callable[[], Tensor],
    pairs: Sequence[FactorPair],
    *,
    max_steps: int = 100,
    stationary: float = 1e-6,
    seed: int = 0,
) -> LocalRate:
    r"""Find the extreme eigenvalues of the Hessian against the invariant metric.

    Near a stationary point ScaledGD is :math:`\xi \leftarrow \xi - \eta\, g^{-1} H \xi` on
    horizontal vectors, and so it converges if :math:`0 < \lambda_1` and
    :math:`\eta\lambda_n < 2`, at the rate :math:`\max |1 - \eta\lambda|`. The eigenvalues do not
    depend on the gauge. They are found by Lanczos with full reorthogonalization, in coordinates in
    which the metric is the unit matrix, from products of the Hessian with vectors by autograd.

    Lanczos from a random vector finds every eigenvalue once its Krylov space is exhausted; before
    that the extremes that it has found lie *within* the true ones, which is an estimate and no
    proof. So the answer is certified only if the space was exhausted, in float64, at a point that
    is stationary, with :math:`\lambda_1 > 0` beyond rounding. It is about a neighbourhood of
    unknown size: never about a basin.

    Args:
        loss: Computes the loss, deterministically, with a graph that can be differentiated twice.
        pairs: The factors that it depends on; see :func:`gauge_ext.optim.factor_pairs`.
        max_steps: The most Hessian-vector products.
        stationary: How long the gradient may be, in the dual of the metric, against the largest
            eigenvalue times the norm of X.
        seed: Of the first vector.

    Returns:
        The eigenvalues and whether they are certified, or the reason why not.

    Raises:
        GeometryError: There are no pairs, or ``max_steps`` is below 1.
    """
    if not pairs or max_steps < 1:
        raise GeometryError(
            f"a local rate needs pairs and at least one step, got {len(pairs)} and {max_steps}."
        )
    for pair in pairs:
        point = _point(pair)
        if bool(point.numerical_rank() < point.rank):
            where = f" of {pair.name!r}" if pair.name else ""
            return _none(f"the rank of the update{where} is below r, where the metric degenerates")
    factors = [factor for pair in pairs for factor in (pair.lora_B, pair.lora_A)]
    gradients = torch.autograd.grad(loss(), factors, create_graph=True)
    if not any(g.requires_grad for g in gradients):
        return _none("the gradient does not depend on the factors: the loss is linear in them")
    frame = _Coordinates(pairs)
    norm = float(torch.linalg.vector_norm(frame.white(gradients)))
    if not math.isfinite(norm):
        return _none("the gradient holds NaN or infinity")

    def apply(v: Tensor) -> Tensor:
        moved = torch.autograd.grad(gradients, factors, frame.tangent(v), retain_graph=True)
        return frame.horizontal(frame.white(moved))

    found = _lanczos(apply, frame.start(seed), min(max_steps, frame.dimension))
    low, high = float(found.values[0]), float(found.values[-1])
    size = max(abs(low), abs(high))
    reason = None
    if any(factor.dtype != torch.float64 for factor in factors):
        reason = "the Hessian was multiplied in lower precision than float64: these are estimates"
    elif not norm <= stationary * size * frame.size:
        reason = f"the point is not stationary: the gradient's length is {norm:.3g}"
    elif not low > 1e-9 * size:
        reason = f"the smallest eigenvalue is {low:.3g}: the point is no strict minimum of X"
    elif not found.exhausted:
        reason = (
            f"after {found.steps} of up to {frame.dimension} steps the extremes are estimates, and "
            "the true ones lie outside them"
        )
    return LocalRate(reason is None, reason, low, high, norm, found.steps)


def _none(reason: str) -> LocalRate:
    return LocalRate(False, reason, math.nan, math.nan, math.nan, 0)


def _point(pair: FactorPair) -> LoRAPoint:
    a, b = to_double(pair.lora_A.detach()).flatten(1), to_double(pair.lora_B.detach()).flatten(1)
    return LoRAPoint(b * pair.scaling, a)


class _Coordinates:
    """Tangent vectors as one vector each, in which the metric is the unit matrix.

    With B = Q_B R_B and A^T = Q_A R_A, (u, w) stands for eta_B = u R_A^-T and eta_A = R_B^-1 w:
    then eta_B A = u Q_A^T and B eta_A = Q_B w, so lengths are those of (u, w).
    """

    def __init__(self, pairs: Sequence[FactorPair]) -> None:
        self._parts = []
        self._shapes: list[torch.Size] = []
        self.size = 0.0
        self.dimension = 0
        for pair in pairs:
            point = _point(pair)
            (q_b, r_b), (q_a, r_a) = thin_qr(point.B), thin_qr(point.A.mT)
            self._parts.append((q_b, r_b, q_a, r_a, pair.scaling))
            self._shapes += [pair.lora_B.shape, pair.lora_A.shape]
            self.size += float(torch.linalg.matrix_norm(r_b @ r_a.mT)) ** 2
            self.dimension += point.rank * (sum(point.shape) - point.rank)
        self.size = self.size**0.5
        self._dtypes = [f.dtype for pair in pairs for f in (pair.lora_B, pair.lora_A)]

    def _split(self, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts, start = [], 0
        for q_b, _, q_a, r_a, _ in self._parts:
            rank = r_a.shape[0]
            sizes = len(q_b) * rank, len(q_a) * rank
            u = v[start : start + sizes[0]].view(-1, rank)
            w = v[start + sizes[0] : start + sum(sizes)].view(rank, -1)
            parts.append((u, w))
            start += sum(sizes)
        return parts

    @staticmethod
    def _join(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([x.flatten() for part in parts for x in part])

    def white(self, covectors: Sequence[Tensor]) -> Tensor:
        """Take derivatives by lora_B and lora_A to coordinates of the gradient."""
        parts = []
        for (_, r_b, _, r_a, s), g_b, g_a in zip(
            self._parts, covectors[::2], covectors[1::2], strict=True
        ):
            b, a = to_double(g_b.detach()).flatten(1) / s, to_double(g_a.detach()).flatten(1)
            u = torch.linalg.solve_triangular(r_a, b, upper=True, left=False)
            parts.append((u, torch.linalg.solve_triangular(r_b.mT, a, upper=False)))
        return self._join(parts)

    def tangent(self, v: Tensor) -> list[Tensor]:
        """Take coordinates to changes of lora_B and lora_A."""
        changes = []
        for (_, r_b, _, r_a, s), (u, w) in zip(self._parts, self._split(v), strict=True):
            b = torch.linalg.solve_triangular(r_a.mT, u, upper=False, left=False) / s
            changes += [b, torch.linalg.solve_triangular(r_b, w, upper=True)]
        return [
            change.view(shape).to(dtype)
            for change, shape, dtype in zip(changes, self._shapes, self._dtypes, strict=True)
        ]

    def horizontal(self, v: Tensor) -> Tensor:
        """Project onto the horizontal vectors, those with Q_B^T u = w Q_A."""
        parts = []
        for (q_b, _, q_a, _, _), (u, w) in zip(self._parts, self._split(v), strict=True):
            half = 0.5 * (q_b.mT @ u - w @ q_a)
            parts.append((u - q_b @ half, w + half @ q_a.mT))
        return self._join(parts)

    def start(self, seed: int) -> Tensor:
        """Draw a horizontal vector."""
        generator = torch.Generator().manual_seed(seed)
        count = sum((len(q_b) + len(q_a)) * len(r_a) for q_b, _, q_a, r_a, _ in self._parts)
        v = torch.randn(count, generator=generator, dtype=torch.float64)
        return self.horizontal(v.to(self._parts[0][0].device))


@dataclass(frozen=True)
class _Ritz:
    values: Tensor
    steps: int
    exhausted: bool


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> _Ritz:
    """The eigenvalues of a symmetric map on the Krylov space of a vector."""
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    exhausted = False
    for _ in range(steps):
        v = apply(basis[-1])
        diagonal.append(float(v @ basis[-1]))
        span = torch.stack(basis)
        for _ in range(2):  # once more for what rounding left of the first time
            v = v - span.mT @ (span @ v)
        rest = float(v.norm())
        if rest <= 1e-10 * max(max(map(abs, diagonal)), max(beside, default=0.0), 1e-300):
            exhausted = True
            break
        beside.append(rest)
        basis.append(v / rest)
    count = len(diagonal)
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside[: count - 1]):
        t[i, i + 1] = t[i + 1, i] = value
    return _Ritz(torch.linalg.eigvalsh(t), count, exhausted)
