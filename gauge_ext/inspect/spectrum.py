"""The singular values of a low-rank update, and the numbers drawn from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import AdapterFormatError, NonFiniteError
from gauge_ext.geometry import linalg


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one update, and the invariants that follow from them.

    Attributes:
        singular_values: sigma_1 >= sigma_2 >= ..., ``min(rank, in, out)`` of them.
        threshold: Values at or below it count as zero: ``sigma_1 * max(in, out) * eps``, with eps
            that of the precision in which an update is accumulated (see :func:`delta_spectrum`).
    """

    singular_values: tuple[float, ...]
    threshold: float

    @property
    def largest(self) -> float:
        """sigma_1 = ||delta_weight||_2: the most that the update can stretch an input."""
        return self.singular_values[0]

    @property
    def frobenius(self) -> float:
        """||delta_weight||_F = sqrt(sum_i sigma_i^2)."""
        return math.hypot(*self.singular_values)

    @property
    def numerical_rank(self) -> int:
        """How many singular values are above :attr:`threshold`; 0 for an update of zeros."""
        return sum(value > self.threshold for value in self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp(H(p)) with p_i = sigma_i / sum_j sigma_j (Roy and Vetterli, EUSIPCO 2007).

        A real number from 1 (one direction does everything) to the rank (all directions alike),
        and 0 for an update of zeros.
        """
        total = math.fsum(self.singular_values)
        if total == 0.0:
            return 0.0
        shares = (value / total for value in self.singular_values)
        return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0.0))

    @property
    def stable_rank(self) -> float:
        """||delta_weight||_F^2 / ||delta_weight||_2^2, at most the rank; 0 for zeros."""
        return (self.frobenius / self.largest) ** 2 if self.largest > 0.0 else 0.0

    @property
    def condition(self) -> float:
        """sigma_1 / sigma_min over the directions the rank allows; infinity where one is unused.

        A smallest value at or below :attr:`threshold` is the rounding of the factors, which
        depends on the gauge, so a ratio with it would too.
        """
        smallest = self.singular_values[-1]
        return self.largest / smallest if smallest > self.threshold else math.inf

    def truncation_loss(self, rank: int) -> float:
        """||X - X_k||_F / ||X||_F for the best X_k of rank k (Eckart-Young); 0 for zeros."""
        return math.hypot(*self.singular_values[rank:]) / self.frobenius if self.largest else 0.0

    def rank_within(self, loss: float) -> int:
        """Find the smallest rank k whose :meth:`truncation_loss` is at most ``loss``."""
        ranks = range(len(self.singular_values) + 1)
        return next(rank for rank in ranks if self.truncation_loss(rank) <= loss)


def delta_spectrum(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Spectrum:
    r"""Compute the singular values of ``scaling * lora_B @ lora_A`` without forming it.

    .. math:: B = Q_B R_B, \quad A^T = Q_A R_A
        \quad\Rightarrow\quad
        \sigma(s\,B A) = |s|\,\sigma(R_B R_A^T)

    because Q_B and Q_A have orthonormal columns. The work is O((in + out) r^2) and the matrix that
    is decomposed is r x r, against O(in * out * min(in, out)) for the update itself. All of it is
    in float64, whatever the factors are stored in: two gauges of one adapter, with factors
    ``(G A, B G^-1)``, then differ by about ``eps64 * cond(G) * sigma_1`` and by nothing else.

    The threshold for the numerical rank is that of ``torch.linalg.matrix_rank`` in the precision
    in which this package accumulates an update when it merges: float64 for float64 factors,
    float32 for all others. Directions below it don't survive a merge.

    Args:
        lora_A: ``(r, in)``, any floating dtype.
        lora_B: ``(out, r)``, any floating dtype.
        scaling: s, alpha / r or alpha / sqrt(r).

    Returns:
        The spectrum, with ``min(r, in, out)`` singular values.

    Raises:
        AdapterFormatError: The factors are not two matrices with one shared rank of at least 1.
        NonFiniteError: A factor or the scaling holds NaN or infinity.
    """
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise AdapterFormatError(
            "lora_A must have shape (r, in) and lora_B (out, r), "
            f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    if 0 in (*lora_A.shape, *lora_B.shape):
        raise AdapterFormatError(
            "the rank and both sizes of a layer must be at least 1, "
            f"got lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}."
        )
    both_double = lora_A.dtype == lora_B.dtype == torch.float64
    factor_A = lora_A.detach().to("cpu", torch.float64)
    factor_B = lora_B.detach().to("cpu", torch.float64)
    finite = torch.isfinite(factor_A).all() and torch.isfinite(factor_B).all()
    if not (finite and math.isfinite(scaling)):
        raise NonFiniteError("the adapter's factors or its scaling hold NaN or infinity.")

    sigma = abs(scaling) * linalg.product_singular_values(factor_B, factor_A)
    sides = (lora_B.shape[0], lora_A.shape[1])
    stored = torch.float64 if both_double else torch.float32
    threshold = float(linalg.rank_threshold(sigma, *sides, stored))
    return Spectrum(tuple(sigma.tolist()), threshold)
