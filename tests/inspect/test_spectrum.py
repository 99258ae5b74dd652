"""The invariants against a dense SVD by numpy, and under random changes of gauge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.errors import AdapterFormatError, NonFiniteError
from gauge_ext.inspect.spectrum import Spectrum, delta_spectrum


def random_factors(
    rank: int, in_features: int, out_features: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    return lora_A.to(dtype), lora_B.to(dtype)


def random_gauge(rank: int, condition: float, seed: int) -> Tensor:
    """An invertible matrix whose condition number is known: Q1 diag(1 .. condition) Q2."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, math.log10(condition), rank, dtype=torch.float64)
    return left @ torch.diag(scales) @ right


def dense_singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> np.ndarray:
    delta = scaling * lora_B.double().numpy() @ lora_A.double().numpy()
    return np.linalg.svd(delta, compute_uv=False)


def invariants(spectrum: Spectrum) -> dict[str, float]:
    return {
        "frobenius": spectrum.frobenius,
        "largest": spectrum.largest,
        "effective_rank": spectrum.effective_rank,
        "stable_rank": spectrum.stable_rank,
        "condition": spectrum.condition,
        "numerical_rank": spectrum.numerical_rank,
    }


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 12),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    scaling=st.sampled_from([2.0, -0.25, 16 / math.sqrt(8)]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_dense_svd(
    rank: int, in_features: int, out_features: int, scaling: float, seed: int
) -> None:
    lora_A, lora_B = random_factors(rank, in_features, out_features, seed)
    expected = dense_singular_values(lora_A, lora_B, scaling)
    spectrum = delta_spectrum(lora_A, lora_B, scaling)

    kept = min(rank, in_features, out_features)
    assert len(spectrum.singular_values) == kept
    np.testing.assert_allclose(
        spectrum.singular_values, expected[:kept], rtol=1e-9, atol=1e-13 * expected[0]
    )
    delta = scaling * lora_B.numpy() @ lora_A.numpy()
    assert spectrum.frobenius == pytest.approx(np.linalg.norm(delta), rel=1e-12)
    assert spectrum.largest == pytest.approx(np.linalg.norm(delta, 2), rel=1e-12)
    assert spectrum.numerical_rank == np.linalg.matrix_rank(delta)
    stable = np.linalg.norm(delta) ** 2 / np.linalg.norm(delta, 2) ** 2
    assert spectrum.stable_rank == pytest.approx(stable, rel=1e-12)
    shares = expected[:kept] / expected[:kept].sum()
    assert spectrum.effective_rank == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 16), condition=st.sampled_from([1.0, 100.0]), seed=st.integers(0, 2**31))
def test_no_change_of_gauge_changes_anything(rank: int, condition: float, seed: int) -> None:
    lora_A, lora_B = random_factors(rank, 48, 32, seed)
    gauge = random_gauge(rank, condition, seed + 1)
    before = delta_spectrum(lora_A, lora_B, 2.0)
    after = delta_spectrum(gauge @ lora_A, lora_B @ torch.linalg.inv(gauge), 2.0)

    np.testing.assert_allclose(
        after.singular_values, before.singular_values, rtol=0, atol=1e-12 * before.largest
    )
    for name, value in invariants(before).items():
        assert invariants(after)[name] == pytest.approx(value, rel=1e-9), name


def test_a_lower_true_rank_is_found_in_every_gauge() -> None:
    lora_A, lora_B = random_factors(6, 64, 48, 3)
    lora_A[4:] = lora_A[:2]  # four independent directions are left
    gauge = random_gauge(6, 100.0, 4)
    regauged = (gauge @ lora_A, lora_B @ torch.linalg.inv(gauge))
    for dtype in (torch.float64, torch.float32):
        for factors in ((lora_A, lora_B), regauged):
            spectrum = delta_spectrum(*(factor.to(dtype) for factor in factors), 2.0)
            assert spectrum.numerical_rank == 4
            assert spectrum.condition == math.inf
            assert spectrum.effective_rank < 4.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_numbers_are_taken_as_they_are(dtype: torch.dtype) -> None:
    lora_A, lora_B = random_factors(8, 64, 96, 5, dtype)
    spectrum = delta_spectrum(lora_A, lora_B, 0.5)
    expected = dense_singular_values(lora_A, lora_B, 0.5)
    np.testing.assert_allclose(spectrum.singular_values, expected[:8], rtol=1e-12)
    assert spectrum.numerical_rank == 8


@pytest.mark.parametrize("zeroed", ["lora_A", "lora_B", "scaling"])
def test_an_update_of_zeros_has_rank_zero(zeroed: str) -> None:
    lora_A, lora_B = random_factors(4, 10, 12, 6)
    if zeroed == "lora_A":
        lora_A.zero_()
    elif zeroed == "lora_B":
        lora_B.zero_()
    spectrum = delta_spectrum(lora_A, lora_B, 0.0 if zeroed == "scaling" else 2.0)
    assert invariants(spectrum) == {
        "frobenius": 0.0,
        "largest": 0.0,
        "effective_rank": 0.0,
        "stable_rank": 0.0,
        "condition": math.inf,
        "numerical_rank": 0,
    }


def test_equal_directions_have_the_full_effective_rank() -> None:
    spectrum = delta_spectrum(torch.eye(5, 9), 3 * torch.eye(7, 5), 2.0)
    assert spectrum.singular_values == pytest.approx([6.0] * 5)
    assert spectrum.effective_rank == pytest.approx(5.0)
    assert spectrum.stable_rank == pytest.approx(5.0)
    assert spectrum.condition == pytest.approx(1.0)


def test_the_update_itself_is_never_formed() -> None:
    size = 300_000  # the dense update would take 720 GB
    lora_A = torch.zeros(2, size)
    lora_B = torch.zeros(size, 2)
    lora_A[0, 0], lora_A[1, -1] = 3.0, 1.0
    lora_B[0, 0], lora_B[-1, 1] = 2.0, 1.0
    assert delta_spectrum(lora_A, lora_B, 0.5).singular_values == pytest.approx((3.0, 0.5))


@pytest.mark.parametrize(
    ("shape_A", "shape_B"), [((4, 10), (12, 3)), ((40,), (12, 4)), ((0, 10), (12, 0))]
)
def test_factors_that_do_not_belong_together(
    shape_A: tuple[int, ...], shape_B: tuple[int, ...]
) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        delta_spectrum(torch.zeros(shape_A), torch.zeros(shape_B), 1.0)
    assert str(shape_A) in str(caught.value)
    assert str(shape_B) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["lora_A", "lora_B", "scaling"])
def test_nan_and_infinity_are_refused(value: float, place: str) -> None:
    lora_A, lora_B = random_factors(4, 10, 12, 7)
    if place == "lora_A":
        lora_A[1, 2] = value
    elif place == "lora_B":
        lora_B[1, 2] = value
    with pytest.raises(NonFiniteError):
        delta_spectrum(lora_A, lora_B, value if place == "scaling" else 1.0)
