"""How well a search finds the one right answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gauge_ext.errors import NonFiniteError


@dataclass(frozen=True)
class Retrieval:
    """Quality of a search in which every query has one right answer.

    Attributes:
        recall_at_1: Share of queries whose answer comes first.
        mrr: Mean reciprocal rank, the mean of 1 / rank (Voorhees, TREC-8, 1999).
        queries: Number of queries.
        candidates: Number of names among which the answer was sought.
    """

    recall_at_1: float
    mrr: float
    queries: int
    candidates: int


def ranks(scores: Tensor, answers: Tensor) -> Tensor:
    """Ranks each query's right answer among all candidates.

    A candidate with the very score of the answer counts as better, so that a model which gives
    everything one score earns nothing by it.

    Args:
        scores: (queries, candidates); larger is better.
        answers: (queries,) int64, the column of the right answer.

    Returns:
        (queries,) int64, from 1.

    Raises:
        NonFiniteError: A score is NaN or infinite; NaN compares as worse and would rank first.
    """
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError("scores hold NaN or infinity, so the candidates have no order.")
    right = scores.gather(1, answers[:, None])
    return (scores >= right).sum(dim=1)  # the answer itself is the 1 that ranks start from


def retrieval(queries: Tensor, candidates: Tensor, answers: Tensor) -> Retrieval:
    """Searches ``candidates`` for every query by inner product, and grades the outcome.

    Args:
        queries: (queries, d), unit vectors.
        candidates: (candidates, d), unit vectors.
        answers: (queries,) int64, the row of each query's right answer.

    Raises:
        NonFiniteError: An embedding holds NaN or infinity.
    """
    rank = ranks(queries @ candidates.T, answers)
    return Retrieval(
        recall_at_1=(rank == 1).double().mean().item(),
        mrr=rank.double().reciprocal().mean().item(),
        queries=len(queries),
        candidates=len(candidates),
    )
