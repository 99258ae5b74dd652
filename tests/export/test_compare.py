from __future__ import annotations

import math

import pytest
import torch

from gauge_ext.export import Tolerance
from gauge_ext.export.compare import compare

NAN, INF = float("nan"), float("inf")
BAR = Tolerance(absolute=1e-3, relative=1e-2, cosine=0.99)


def test_numbers_by_hand():
    y = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    z = torch.tensor([[3.0, -4.03], [0.01, 1.0]])
    found = compare("y", y, z, BAR, logits=True)
    assert found.passed
    assert found.max_abs == pytest.approx(0.03, rel=1e-5)
    assert found.relative == pytest.approx(0.03 / 4, rel=1e-5)
    assert found.limit == pytest.approx(1e-3 + 1e-2 * 4)
    dot, norms = 9 + 16.12 + 1, math.sqrt(26) * math.sqrt(9 + 4.03**2 + 0.01**2 + 1)
    assert found.cosine == pytest.approx(dot / norms, rel=1e-6)
    assert found.top1 == 1.0
    assert (found.dtype, found.shape) == ("float32", (2, 2))


def test_each_part_of_the_bar_can_fail_alone():
    y = torch.tensor([1.0, 2.0, 3.0])
    far = compare("y", y, y + torch.tensor([0.0, 0.0, 0.5]), BAR)
    assert not far.passed
    assert "max abs 5.000e-01 > 3.100e-02 (largest entry 3.000e+00)" in far.reason
    loose = Tolerance(absolute=0.9, relative=0.0, cosine=0.999)
    turned = compare("y", y, torch.tensor([1.8, 1.2, 3.0]), loose)
    assert "cosine" in turned.reason
    logits = torch.tensor([[1.0, 1.5], [2.0, 0.0]])
    flipped = compare(
        "y", logits, torch.tensor([[1.5, 1.0], [2.0, 0.0]]), Tolerance(1, 1, -1), logits=True
    )
    assert flipped.top1 == 0.5
    assert "top-1 agreement 50.00% < 100.00%" in flipped.reason


def test_a_tie_may_go_either_way():
    y = torch.tensor([[1.0, 1.0 + 1e-7, 0.0]])
    z = torch.tensor([[1.0 + 2e-7, 1.0, 0.0]])
    assert compare("y", y, z, BAR, logits=True).top1 == 1.0


def test_integers_have_to_be_equal():
    y = torch.tensor([1, 2, 3])
    assert compare("y", y, y.clone(), BAR).passed
    found = compare("y", y, torch.tensor([1, 2, 4]), Tolerance.within(1e6))
    assert not found.passed
    assert found.cosine is None
    assert "integers differ" in found.reason
    assert not compare("y", torch.tensor([True]), torch.tensor([False]), BAR).passed


def test_nan_and_infinity_have_to_be_at_the_same_places():
    y = torch.tensor([1.0, NAN, INF, -INF])
    same = compare("y", y, y + torch.tensor([1e-4, 0, 0, 0]), BAR)
    assert same.passed
    assert same.max_abs == pytest.approx(1e-4, rel=1e-2)
    for other in ([1.0, 0.0, INF, -INF], [NAN, NAN, INF, -INF], [1.0, NAN, -INF, -INF]):
        found = compare("y", y, torch.tensor(other), BAR)
        assert not found.passed
        assert "NaN or infinity in one and not in the other, at 1 entries" in found.reason


def test_masked_logits():
    y = torch.tensor([[-INF, 2.0, 1.0], [NAN, NAN, NAN], [-INF, -INF, -INF]])
    assert compare("y", y, y.clone(), BAR, logits=True).top1 == 1.0
    other = torch.tensor([[-INF, 1.0, 2.0], [NAN, NAN, NAN], [-INF, -INF, -INF]])
    assert compare("y", y, other, Tolerance(9, 9, -1), logits=True).top1 == 0.5


def test_shapes_and_dtypes_have_to_be_equal():
    y = torch.ones(2, 3)
    assert "has shape (3, 2), torch's is (2, 3)" in compare("y", y, torch.ones(3, 2), BAR).reason
    assert "torch.float64" in compare("y", y, y.double(), BAR).reason


def test_noise_has_no_direction_and_emptiness_no_difference():
    tiny = torch.tensor([1e-6, -1e-6])
    assert compare("y", tiny, -tiny, BAR).passed
    assert compare("y", torch.zeros(3), torch.zeros(3), BAR).relative == 0.0
    assert not compare("y", torch.zeros(3), torch.ones(3), BAR).passed
    assert compare("y", torch.ones(0, 3), torch.ones(0, 3), BAR, logits=True).passed
    assert compare("y", torch.tensor(2.0), torch.tensor(2.0), BAR, logits=True).passed


def test_zeros_for_something_are_found_even_under_a_loose_bar():
    y = torch.full((4,), 0.5)
    assert compare("y", y, torch.zeros(4), Tolerance(0.1, 1.0, 0.9)).cosine == 0.0
