"""The fingerprint: a function of the updates alone, and a fair estimate of their angle."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gauge_ext.errors import ConfigError, GeometryError, NonFiniteError
from gauge_ext.geometry import LoRAPoint
from gauge_ext.geometry.fingerprint import Fingerprint, fingerprint_points

F64 = torch.float64
SHAPES = {f"layer.{i}.{name}": (40 + i, 30) for i in range(4) for name in ("query", "value")}


def adapter(seed: int, dtype: torch.dtype = F64, rank: int = 6) -> dict[str, LoRAPoint]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: LoRAPoint(
            torch.randn(m, rank, generator=g, dtype=F64), torch.randn(rank, n, generator=g).to(F64)
        ).to(dtype)
        for name, (m, n) in SHAPES.items()
    }


def regauged(points: dict[str, LoRAPoint], seed: int) -> dict[str, LoRAPoint]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: point.act(torch.randn(point.rank, point.rank, generator=g, dtype=F64))
        for name, point in points.items()
    }


def dense(points: dict[str, LoRAPoint]) -> Tensor:
    """All updates as one long vector."""
    return torch.cat([(p.B.double() @ p.A.double()).flatten() for p in points.values()])


def mixed(share: float, seed: int) -> dict[str, LoRAPoint]:
    """An adapter at an angle to ``adapter(seed)``, as a concatenation of two."""
    one, two = adapter(seed), adapter(seed + 1000)
    return {
        name: LoRAPoint(
            torch.cat([one[name].B, share * two[name].B], -1),
            torch.cat([one[name].A, two[name].A], -2),
        )
        for name in one
    }


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 16))
def test_the_sketch_is_invariant_under_every_change_of_gauge(seed: int, size: int) -> None:
    points = adapter(seed)
    found = fingerprint_points(points, size=size)
    other = fingerprint_points(regauged(points, seed + 1), size=size)
    for name, sketch in found.sketches.items():
        assert float((other.sketches[name] - sketch).norm() / sketch.norm()) < 1e-11
        update = points[name].B @ points[name].A
        assert found.norms[name] == pytest.approx(float(update.norm()), rel=1e-12)
    assert other.key == found.key
    assert found.cosine(other) == pytest.approx(1.0, abs=1e-12)
    assert found.distance(other) < 1e-11


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0, 3.0])
def test_cosine_and_distance_estimate_those_of_the_dense_updates(share: float) -> None:
    x, y = adapter(3), mixed(share, 3)
    cosine = float(torch.cosine_similarity(dense(x), dense(y), dim=0))
    distance = float((dense(x) - dense(y)).norm() / max(dense(x).norm(), dense(y).norm()))
    one, two = fingerprint_points(x, size=64), fingerprint_points(y, size=64)
    assert one.cosine(two) == pytest.approx(cosine, abs=0.06)
    assert one.distance(two) == pytest.approx(distance, rel=0.1, abs=1e-12)
    assert (two.cosine(one), two.distance(one)) == (one.cosine(two), one.distance(two))
    assert two.norm == pytest.approx(float(dense(y).norm()))


def test_unrelated_adapters_are_orthogonal_and_half_their_bits_differ() -> None:
    prints = [fingerprint_points(adapter(seed)) for seed in range(8)]
    distances = []
    for i, one in enumerate(prints):
        for two in prints[:i]:
            assert abs(one.cosine(two)) < 0.15
            assert one.distance(two) > 1.2
            distances.append((bits(one) ^ bits(two)).bit_count())
    assert 28 < sum(distances) / len(distances) < 36


def bits(found: Fingerprint) -> int:
    return int(found.key.split("-")[1], 16)


def test_keys_survive_the_rounding_of_float32() -> None:
    same = 0
    for seed in range(20):
        points = adapter(seed, torch.float32, rank=4)
        one = fingerprint_points(points)
        two = fingerprint_points(regauged(points, seed + 77))
        assert one.distance(two) < 1e-3
        same += one.key == two.key
    assert same >= 19
    half = fingerprint_points(adapter(0, torch.bfloat16, rank=4))
    full = fingerprint_points(adapter(0, rank=4))
    assert half.distance(full) < 1e-2
    assert (bits(half) ^ bits(full)).bit_count() <= 3


def test_the_key_tells_layers_directions_and_sizes_apart() -> None:
    points = adapter(1)
    where, sign, norm = parts(points)
    flipped = {name: LoRAPoint(-p.B, p.A) for name, p in points.items()}
    assert parts(flipped)[::2] == (where, norm)
    assert bits(fingerprint_points(flipped)) == bits(fingerprint_points(points)) ^ (2**64 - 1)
    doubled = {name: LoRAPoint(2 * p.B, p.A) for name, p in points.items()}
    assert parts(doubled)[:2] == (where, sign)
    assert int(parts(doubled)[2]) == int(norm) + 32
    fewer = dict(list(points.items())[:-1])
    assert parts(fewer)[0] != where
    renamed = {f"model.{name}": point for name, point in points.items()}
    assert parts(renamed)[0] != where
    assert abs(fingerprint_points(renamed).cosine(fingerprint_points(points))) == 0.0
    assert parts(dict(reversed(points.items()))) == (where, sign, norm)


def parts(points: dict[str, LoRAPoint]) -> tuple[str, str, str]:
    where, sign, norm = fingerprint_points(points).key.split("-", 2)
    return where, sign, norm


def test_layers_that_one_side_lacks_count_as_zero_there() -> None:
    points = adapter(2)
    fewer = dict(list(points.items())[:2])
    one, two = fingerprint_points(points), fingerprint_points(fewer)
    share = two.norm / one.norm
    assert one.cosine(two) == pytest.approx(share, rel=0.15)
    assert one.distance(two) == pytest.approx(math.sqrt(1 - share**2), rel=0.15)
    name = next(iter(points))
    wider = {name: LoRAPoint(points[name].B, torch.cat([points[name].A] * 2, -1))}
    narrow = {name: points[name]}
    assert fingerprint_points(wider).cosine(fingerprint_points(narrow)) == 0.0
    assert fingerprint_points(wider).distance(fingerprint_points(narrow)) > 1.0


def test_an_update_of_zeros_has_a_fingerprint() -> None:
    points = adapter(4)
    zero = fingerprint_points({name: LoRAPoint(0 * p.B, p.A) for name, p in points.items()})
    other = fingerprint_points(points)
    assert zero.key.endswith("-0000000000000000-zero")
    assert (zero.cosine(zero), zero.distance(zero)) == (1.0, 0.0)
    assert (zero.cosine(other), other.distance(zero)) == (0.0, 1.0)


def test_signs_are_those_of_shake_256_on_every_machine() -> None:
    ones = {"a": LoRAPoint(torch.ones(3, 1), torch.ones(1, 2))}
    found = fingerprint_points(ones, size=2)
    code = (
        "import hashlib\n"
        "def signs(label, rows, columns):\n"
        "    seed = f'gauge_ext fingerprint 1\\0{label}\\0{rows}\\0{columns}'.encode()\n"
        "    drawn = hashlib.shake_256(seed).digest(rows * columns // 8 + 1)\n"
        "    drawn = int.from_bytes(drawn, 'little')\n"
        "    return [[2 * (drawn >> (i * columns + j) & 1) - 1 for j in range(columns)]"
        " for i in range(rows)]\n"
        "left, right = signs('left\\0a', 3, 2), signs('right\\0a', 2, 2)\n"
        "print([sum(map(sum, zip(*[[x * y / 2 for x in column] for y in other])))"
        " for column in zip(*left) for other in zip(*right)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.sketches["a"].flatten().tolist() == eval(done.stdout)


def test_the_product_is_never_formed() -> None:
    size = 100_000  # 80 GB
    points = {"wide": LoRAPoint(torch.ones(size, 1), torch.ones(1, size))}
    assert fingerprint_points(points, size=4).norm == pytest.approx(size)


def test_what_has_no_fingerprint_is_refused() -> None:
    points = adapter(5)
    with pytest.raises(ConfigError, match="size must be at least 1, got 0"):
        fingerprint_points(points, size=0)
    with pytest.raises(GeometryError, match="at least one layer, got none"):
        fingerprint_points({})
    name, point = next(iter(points.items()))
    with pytest.raises(GeometryError, match=r"'layer.0.query' have batch dimensions, \(1,\)"):
        fingerprint_points({name: LoRAPoint(point.B[None], point.A[None])})
    with pytest.raises(NonFiniteError, match="'layer.0.query' hold NaN"):
        fingerprint_points({name: LoRAPoint(math.nan * point.B, point.A)})
    with pytest.raises(GeometryError, match="got 16 and 8"):
        fingerprint_points(points).cosine(fingerprint_points(points, size=8))
