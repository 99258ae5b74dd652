"""Every option that cannot be used is refused before any work, by its name."""

from __future__ import annotations

from typing import Any

import pytest
from merging_problems import F64, Family

from gauge_ext.errors import ConfigError
from gauge_ext.merging import METHODS, Recipe, combine
from gauge_ext.merging.recipe import MEANS, SPARSE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "linear"}, "method must be one of exact"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"energy": 0.0}, "energy must lie"),
        ({"energy": float("nan")}, "energy must lie"),
        ({"seed": -1}, "seed must be"),
        ({"min_alignment": 2.0}, "min_alignment must lie"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 0.0}, "density must lie"),
        ({"method": "ties", "density": 1.1}, "density must lie"),
        ({"method": "ties", "density": 0.5, "space": "rows"}, "space must be one of"),
        ({"method": "knots", "density": 0.5, "space": "entries"}, '"knots" is TIES'),
        ({"density": 0.5}, "density means nothing"),
        ({"method": "bures", "space": "knots"}, "space means nothing"),
    ],
)
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe(**options)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([], "got 2 adapters and 0 weights"),
        ([1.0], "got 2 adapters and 1 weights"),
        ([1.0, float("inf")], "finite"),
        ([1.0, "1"], "finite"),
    ],
)
def test_weights_refused(weights: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe().check_weights(weights, 2)


def test_no_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one adapter"):
        combine([], [])


@pytest.mark.parametrize("method", METHODS)
def test_negative_weights_where_they_mean_something(method: str) -> None:
    recipe = Recipe(method, density=0.5 if method in SPARSE else None)
    if method in ("exact", "dare_linear", "magnitude_prune"):
        assert recipe.check_weights([-1, 2], 2) == (-1.0, 2.0)
    else:
        assert method in (*MEANS, "ties", "dare_ties", "knots")
        with pytest.raises(ConfigError, match="needs positive weights, got -1"):
            recipe.check_weights([-1, 2], 2)


def test_a_mixture_of_kinds_is_refused() -> None:
    (point,) = Family(8, 7, (2,), F64, 1.0, seed=1).points()
    with pytest.raises(ConfigError, match="got LoRAPoint, str"):
        combine([point, "folder"], [1.0, 1.0])
