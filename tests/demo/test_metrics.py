from __future__ import annotations

import math

import pytest
import torch

from gauge_ext.demo.metrics import ranks, retrieval
from gauge_ext.errors import NonFiniteError


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert ranks(scores, torch.tensor([0, 1, 2])).tolist() == [1, 3, 2]


def test_ties_count_against_the_answer() -> None:
    assert ranks(torch.zeros(1, 4), torch.tensor([2])).tolist() == [4]


def test_retrieval_by_hand() -> None:
    names = torch.eye(4)
    queries = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0],  # its answer is first
            [0.8, 0.6, 0.0, 0.0],  # second
            [0.7, 0.5, 0.1, 0.5],  # fourth
        ]
    )
    found = retrieval(queries, names, torch.tensor([0, 1, 2]))
    assert found.recall_at_1 == pytest.approx(1 / 3)
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    assert (found.queries, found.candidates) == (3, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_nan_is_not_perfect(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        retrieval(torch.full((2, 3), bad), torch.eye(3), torch.tensor([0, 1]))
