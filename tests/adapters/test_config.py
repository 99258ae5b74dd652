"""The config: what it accepts, what it says of the rest, and its numbers."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gauge_ext.adapters import LoRAConfig
from gauge_ext.errors import ConfigError, GaugeError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": -3}, "rank must be"),
        ({"rank": 4.0}, "rank must be a whole number of at least 1, got 4.0"),
        ({"rank": True}, "rank must be"),
        ({"rank": "8"}, "rank must be"),
        ({"alpha": math.nan}, "alpha must be a finite number, got nan"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"alpha": "16"}, "alpha must be"),
        ({"alpha": None}, "alpha must be"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in [0, 1)"),
        ({"dropout": math.nan}, "dropout must be a finite number"),
        ({"target_modules": []}, "target_modules must name at least one module"),
        ({"target_modules": None}, "target_modules must name at least one module"),
        ({"target_modules": ""}, "target_modules must be a string that is not empty"),
        ({"target_modules": ["a", 3]}, "each name in target_modules must be"),
        ({"target_modules": ["a", ""]}, "each name in target_modules must be"),
        ({"target_modules": 7}, "target_modules must be a string or a list of strings, got 7"),
        ({"target_modules": "(query"}, "target_modules holds '(query', not a regular expression"),
        ({"exclude_modules": "[a"}, "exclude_modules holds '[a', not a regular expression"),
        ({"exclude_modules": [None]}, "each name in exclude_modules"),
        ({"use_rslora": 1}, "use_rslora must be True or False, got 1"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern['a'] must be a whole number"),
        ({"rank_pattern": {"a(": 4}}, "each key of rank_pattern holds 'a('"),
        ({"rank_pattern": [4]}, "rank_pattern must be a mapping"),
        ({"alpha_pattern": {"a": math.inf}}, "alpha_pattern['a'] must be a finite number"),
        ({"alpha_pattern": {3: 1.0}}, "each key of alpha_pattern must be a string"),
        ({"target_modules": ["a"], "layers_to_transform": -1}, "layers_to_transform must be"),
        ({"target_modules": ["a"], "layers_to_transform": [0, "1"]}, "layers_to_transform must be"),
        ({"target_modules": ["a"], "layers_to_transform": True}, "layers_to_transform must be"),
        ({"layers_to_transform": 1}, "layers_to_transform needs a list of names"),
        ({"target_modules": "a", "layers_to_transform": [1]}, "needs a list of names"),
        ({"target_modules": ["a"], "layers_pattern": "h"}, "needs layers_to_transform"),
        ({"init": "pissa_niter_0"}, "init must be kaiming or gaussian or orthogonal or pissa"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be one of"),
        ({"adapter_dtype": "float32"}, "adapter_dtype must be one of"),
        ({"task_type": 3}, "task_type must be a string or None, got 3"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string or None"),
        ({"extra": [1]}, "extra must be a mapping"),
    ],
)
def test_what_cannot_be_used_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(**fields)
    assert words in str(caught.value)
    assert isinstance(caught.value, GaugeError)
    assert isinstance(caught.value, ValueError)


def test_numbers_by_hand() -> None:
    config = LoRAConfig(
        rank=8,
        alpha=16,
        target_modules=["query", "value"],
        rank_pattern={"value": 4, r"layer\.1\.query": 2},
        alpha_pattern={"layer.1.query": 3.0},
    )
    assert (config.rank_for("layer.0.query"), config.scaling_for("layer.0.query")) == (8, 2.0)
    assert (config.rank_for("layer.0.value"), config.scaling_for("layer.0.value")) == (4, 4.0)
    assert (config.rank_for("layer.1.query"), config.scaling_for("layer.1.query")) == (2, 1.5)
    assert config.alpha_for("layer.1.query") == 3.0
    stabilised = LoRAConfig(rank=4, alpha=10, use_rslora=True)
    assert stabilised.scaling_for("anything") == 5.0


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(-1e6, 1e6, allow_nan=False),
    rslora=st.booleans(),
)
def test_scaling_is_alpha_over_rank_or_its_root(rank: int, alpha: float, rslora: bool) -> None:
    config = LoRAConfig(rank=rank, alpha=alpha, use_rslora=rslora)
    assert config.scaling_for("x") == alpha / (rank**0.5 if rslora else rank)


def test_it_keeps_its_own_copies() -> None:
    names, table, extra = ["a", "b", "a"], {"a": 2}, {"note": 1}
    config = LoRAConfig(target_modules=names, rank_pattern=table, extra=extra)
    names.append("c")
    table["a"] = 3
    extra["note"] = 2
    assert config.target_modules == ("a", "b")  # once each, in order
    assert config.rank_for("a") == 2
    assert config.extra == {"note": 1}


def test_sets_come_out_in_one_order_and_empty_lists_as_none() -> None:
    config = LoRAConfig(
        target_modules={"v", "q", "k"},  # type: ignore[arg-type]
        exclude_modules=[],
        layers_to_transform=[],
        layers_pattern=[],
    )
    assert config.target_modules == ("k", "q", "v")
    assert config.exclude_modules is None
    assert config.layers_to_transform is None
    assert config.layers_pattern is None


def test_all_linear_is_known_in_any_case_and_selects_by_exclusion_alone() -> None:
    config = LoRAConfig(target_modules="All-Linear", exclude_modules=["head"])
    assert config.is_all_linear
    assert config.selects("encoder.anything")
    assert not config.selects("model.head")
    assert not LoRAConfig(target_modules=["all-linear"]).is_all_linear


def test_it_cannot_be_changed_but_copied_and_pickled() -> None:
    config = LoRAConfig(target_modules=["a"], adapter_dtype=torch.float64, extra={"x": [1]})
    with pytest.raises(AttributeError):
        config.rank = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert config != LoRAConfig(target_modules=["a"])
