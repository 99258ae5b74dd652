"""The assignment problem against SciPy's solver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from gauge_ext.errors import GeometryError
from gauge_ext.geometry.assignment import best_assignment


@given(st.integers(1, 30), st.integers(0, 2**16), st.sampled_from(["normal", "ties", "product"]))
def test_no_permutation_scores_more(size: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if kind == "ties":
        score = score.sign() * (score.abs() > 0.5)
    elif kind == "product":  # the worst case for augmenting paths
        score = -torch.outer(*torch.arange(1.0, size + 1).double().expand(2, size))
    found = best_assignment(score)
    assert sorted(found.tolist()) == list(range(size))
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    best = float(score.numpy()[rows, columns].sum())
    assert float(score.gather(1, found[:, None]).sum()) == pytest.approx(best, abs=1e-9)


def test_a_hidden_permutation_is_found() -> None:
    weight = torch.randn(500, 40)
    order = torch.randperm(500)
    noisy = weight[order] + 0.3 * torch.randn(500, 40)
    assert torch.equal(best_assignment(noisy @ weight.T), order)


@pytest.mark.parametrize("score", [torch.ones(2, 3), torch.ones(3), torch.full((2, 2), torch.inf)])
def test_what_is_no_square_of_numbers_is_refused(score: torch.Tensor) -> None:
    with pytest.raises(GeometryError):
        best_assignment(score)
