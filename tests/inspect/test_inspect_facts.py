"""The facts beside the spectrum, against dense numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.inspect import (
    FORMATS,
    READERS,
    Spectrum,
    base_shares,
    compare,
    factor_balance,
    find_misreadings,
    rounding_error,
    rounding_errors,
)


def point(m: int = 24, n: int = 18, r: int = 4, seed: int = 0) -> LoRAPoint:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, r, dtype=torch.float64)
    b = torch.randn(m, r, generator=generator, dtype=torch.float64) * spread
    return LoRAPoint(b, torch.randn(r, n, generator=generator, dtype=torch.float64))


def gauge(r: int = 4, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, r, generator=generator, dtype=torch.float64)


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.half)])
def test_rounding_to_floats_against_the_dense_update(name: str, dtype: torch.dtype) -> None:
    p = point()
    rounded = p.B.to(dtype).double().numpy() @ p.A.to(dtype).double().numpy()
    expected = relative(rounded, p.B.numpy() @ p.A.numpy())
    assert rounding_error(p, name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "bits", "axes"),
    [
        ("int8, one scale", 8, (None, None)),
        ("int8 by component", 8, (0, 1)),
        ("int4 by component", 4, (0, 1)),
    ],
)
def test_rounding_to_integers_against_the_dense_update(
    name: str, bits: int, axes: tuple[int | None, int | None]
) -> None:
    p = point()
    levels = 2 ** (bits - 1) - 1
    factors = []
    for factor, axis in ((p.B.numpy(), axes[0]), (p.A.numpy(), axes[1])):
        scale = np.abs(factor).max(axis=axis, keepdims=True) / levels
        factors.append(np.rint(factor / scale) * scale)
    expected = relative(factors[0] @ factors[1], p.B.numpy() @ p.A.numpy())
    assert rounding_error(p, name) == pytest.approx(expected, rel=1e-9)


def test_the_best_gauge_is_the_least_of_what_was_measured() -> None:
    for row in rounding_errors(point()):
        assert row.errors[row.best] == min(row.errors.values())
        assert set(row.errors) == {"stored", "svd", "balanced", "equal_energy"}


def test_canonical_gauges_round_alike_from_any_gauge() -> None:
    # "svd" is unique, so where training left the factors cannot matter; as stored, it does.
    p = point()
    first, second = rounding_errors(p), rounding_errors(p.act(gauge()))
    for a, b in zip(first, second, strict=True):
        assert a.errors["svd"] == pytest.approx(b.errors["svd"], rel=1e-6)
        assert a.errors["stored"] != pytest.approx(b.errors["stored"], rel=1e-3)


def test_out_of_range_is_infinite_and_zero_is_exact() -> None:
    p = point()
    assert rounding_error(LoRAPoint(p.B * 1e6, p.A), "float16") == math.inf
    zero = LoRAPoint(torch.zeros_like(p.B), p.A)
    assert all(rounding_error(zero, name) == 0.0 for name in FORMATS)
    with pytest.raises(ConfigError, match="format must be one of"):
        rounding_error(p, "int3")


def test_balance_of_a_balanced_pair_is_one_and_scales_show() -> None:
    p = point()
    u, s, vh = np.linalg.svd(p.B.numpy() @ p.A.numpy())
    root = np.sqrt(s[:4])
    balanced = LoRAPoint(torch.tensor(u[:, :4] * root), torch.tensor(root[:, None] * vh[:4]))
    found = factor_balance(balanced)
    assert found.norm_ratio == pytest.approx(1.0)
    assert found.condition == pytest.approx(1.0)
    # (B/c, cA): P = c·1, whose condition is 1; the ratio of norms shows it.
    scaled = factor_balance(LoRAPoint(balanced.B / 3, balanced.A * 3))
    assert scaled.condition == pytest.approx(1.0)
    assert scaled.norm_ratio == pytest.approx(1 / 9)
    stretch = torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert factor_balance(balanced.act(stretch)).condition == pytest.approx(10.0)


def test_a_fresh_adapter_has_no_balance() -> None:
    p = point()
    found = factor_balance(LoRAPoint(torch.zeros_like(p.B), p.A))
    assert found.norm_ratio == 0.0
    assert math.isnan(found.condition)


def test_shares_of_the_base_against_a_dense_svd() -> None:
    p = point()
    base = nn.Sequential(nn.Linear(18, 24))
    # A gap behind the fourth singular value, so that the leading directions are well defined.
    u, s, vh = np.linalg.svd(base[0].weight.detach().double().numpy(), full_matrices=False)
    s[4:] *= 0.05
    base[0].weight.data = torch.tensor(u * s @ vh, dtype=torch.float32)
    w = base[0].weight.detach().double().numpy()
    u, s, vh = np.linalg.svd(w)
    x = p.B.numpy() @ p.A.numpy()
    inside = np.linalg.norm(u[:, :4].T @ x @ vh[:4].T) ** 2 / np.linalg.norm(x) ** 2
    found = base_shares({"0": p}, base)["0"]
    assert found.share == pytest.approx(np.linalg.norm(x) / np.linalg.norm(w), rel=1e-6)
    assert found.overlap == pytest.approx(inside, rel=1e-4)
    assert found.chance == pytest.approx(16 / (24 * 18))


def test_a_base_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="no weight for '1'"):
        base_shares({"1": point()}, nn.Sequential(nn.Linear(18, 24)))
    with pytest.raises(AdapterMismatchError, match=r"shape \(24, 18\).*\(24, 9\)"):
        base_shares({"0": point()}, nn.Sequential(nn.Linear(9, 24)))


def test_comparison_against_dense_numbers_and_scipy() -> None:
    x, y = point(seed=1), point(seed=2, r=3)
    found = compare({"a": x}, {"a": y}, "other")
    dx, dy = x.B.numpy() @ x.A.numpy(), y.B.numpy() @ y.A.numpy()
    nx, ny = np.linalg.norm(dx), np.linalg.norm(dy)
    (layer,) = found.layers
    assert layer.cosine == pytest.approx((dx * dy).sum() / (nx * ny))
    assert layer.distance == pytest.approx(np.linalg.norm(dx - dy) / max(nx, ny))
    for ours, first, second in (
        (layer.column_angles, dx, dy),
        (layer.row_angles, dx.T, dy.T),
    ):
        bases = scipy.linalg.orth(first), scipy.linalg.orth(second)
        expected = np.rad2deg(np.sort(scipy.linalg.subspace_angles(*bases)))
        np.testing.assert_allclose(ours, expected, atol=1e-8)


def test_totals_count_layers_that_one_of_them_lacks() -> None:
    x, y, z = point(seed=1), point(seed=2), point(seed=3)
    found = compare({"a": x, "b": y}, {"a": x.act(gauge()), "c": z}, "other")
    dx, dy, dz = (q.B.numpy() @ q.A.numpy() for q in (x, y, z))
    first = np.concatenate([dx.ravel(), dy.ravel(), 0 * dz.ravel()])
    second = np.concatenate([dx.ravel(), 0 * dy.ravel(), dz.ravel()])
    norms = np.linalg.norm(first), np.linalg.norm(second)
    assert found.cosine == pytest.approx(first @ second / (norms[0] * norms[1]))
    assert found.distance == pytest.approx(np.linalg.norm(first - second) / max(norms))
    assert (found.only_here, found.only_there) == (("b",), ("c",))
    assert not found.duplicate


def test_a_copy_in_another_gauge_is_a_duplicate_and_a_scaled_one_is_not() -> None:
    x = point()
    assert compare({"a": x}, {"a": x.act(gauge())}, "copy").duplicate
    assert not compare({"a": x}, {"a": LoRAPoint(1.1 * x.B, x.A)}, "scaled").duplicate


def test_adapters_of_different_models_are_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="no layer in common"):
        compare({"a": point()}, {"b": point()}, "other")
    with pytest.raises(AdapterMismatchError, match="have shapes"):
        compare({"a": point()}, {"a": point(m=25)}, "other")


def test_truncation_loss_is_that_of_eckart_and_young() -> None:
    spectrum = Spectrum((3.0, 2.0, 1.0, 0.1), 1e-6)
    total = math.sqrt(9 + 4 + 1 + 0.01)
    assert spectrum.truncation_loss(2) == pytest.approx(math.sqrt(1.01) / total)
    assert spectrum.truncation_loss(4) == 0.0
    assert spectrum.rank_within(math.sqrt(1.01) / total) == 2
    assert spectrum.rank_within(0.0) == 4
    assert Spectrum((0.0, 0.0), 0.0).rank_within(0.0) == 0


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        ({"r": 8}, [8], set()),
        ({"use_rslora": True}, [8], {("sglang", "misread"), ("llama.cpp", "misread")}),
        ({}, [8, 4], {("vllm", "misread")}),
        (
            {"alpha_pattern": {"q": 3}},
            [8],
            {("vllm", "misread"), ("llama.cpp", "misread"), ("olive", "misread")},
        ),
        ({"bias": "all"}, [8], {("vllm", "refused")}),
        ({"use_dora": True}, [8], {("vllm", "refused"), ("llama.cpp", "refused")}),
    ],
)
def test_what_readers_get_wrong(
    config: dict[str, object], ranks: list[int], expected: set[tuple[str, str]]
) -> None:
    found = find_misreadings(config, ranks)
    assert {(finding.reader, finding.effect) for finding in found} == expected
    only = find_misreadings(config, ranks, ["vllm"])
    assert {finding.reader for finding in only} <= {"vllm"}


def test_an_unknown_reader_is_refused() -> None:
    with pytest.raises(ConfigError, match="reader must be one of " + ", ".join(READERS)):
        find_misreadings({}, [8], ["tgi"])
