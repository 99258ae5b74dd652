"""PEFT's rules of names, against PEFT's own functions and against cases written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gauge_ext.adapters import patterns

PARTS = st.sampled_from(["layer", "layers", "0", "1", "12", "query", "dense", "h", "q_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)


@pytest.mark.parametrize(
    ("selector", "name", "expected"),
    [
        (["query"], "encoder.layer.0.query", True),
        (["query"], "query", True),
        (["query"], "encoder.my_query", False),  # the end of a part is not the end of a path
        (["query"], "query.bias", False),
        (["self.query"], "encoder.self.query", True),
        (["encoder.0.query"], "encoder.0.query", True),
        (["que.*"], "encoder.query", False),  # names in a list are no expressions
        (r".*\.query", "encoder.query", True),
        (r".*\.query", "encoder.query.lora", False),  # the whole path must match
        (r"query", "encoder.query", False),
        ([], "query", False),
    ],
)
def test_selects(selector: str | list[str], name: str, expected: bool) -> None:
    assert patterns.selects(selector, name) is expected


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        ({"query": 4}, "encoder.query", 4),
        ({"query": 4}, "encoder.my_query", 8),
        ({r"layer\.[01]\.query": 4}, "encoder.layer.1.query", 4),
        ({r"layer\.[01]\.query": 4}, "encoder.layer.2.query", 8),
        ({"que.*": 4, "query": 16}, "encoder.query", 4),  # the first hit wins
        ({"^encoder.query": 4}, "encoder.query", 4),
        ({"^query": 4}, "encoder.query", 8),
        ({"quer": 4}, "encoder.query", 8),  # the end of the path must match
        ({"a+b": 4}, "a+b", 4),  # the very path, though it is no match of itself
        ({}, "query", 8),
    ],
)
def test_lookup(table: dict[str, int], name: str, expected: int) -> None:
    assert patterns.lookup(table, name, 8) == expected


@pytest.mark.parametrize(
    ("name", "holders", "expected"),
    [
        ("model.layers.3.q_proj", [], 3),
        ("model.layers.1.experts.7.up", [], 1),  # the first number, not the expert's
        ("layers.3.q_proj", [], None),
        ("layers.3.q_proj", ["layers"], 3),
        ("model.h.3.q_proj", ["layers"], None),
        ("model.h.3.q_proj", ["layers", "h"], 3),
        ("model.layers.3", ["layers"], None),
    ],
)
def test_layer_index(name: str, holders: list[str], expected: int | None) -> None:
    assert patterns.layer_index(name, holders) == expected


@given(
    name=NAMES,
    targets=st.lists(NAMES, min_size=1, max_size=3),
    exclude=st.none() | st.lists(NAMES, min_size=1, max_size=2),
    layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 12), min_size=1, max_size=2),
    holders=st.none() | st.sampled_from(["layer", ["layers", "h"]]),
)
def test_a_config_selects_what_pefts_does(
    name: str,
    targets: list[str],
    exclude: list[str] | None,
    layers: int | list[int] | None,
    holders: str | list[str] | None,
) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    from gauge_ext.adapters import LoRAConfig

    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": holders if layers is not None else None,
    }
    theirs = check_target_module_exists(peft.LoraConfig(**fields), name)
    expected = bool(theirs) and not isinstance(theirs, _ExcludedModule)
    assert LoRAConfig(**fields).selects(name) is expected


@given(
    name=NAMES,
    table=st.dictionaries(
        NAMES | st.sampled_from([".*query", "[0-9]+", "^layer.0", "h|dense"]), st.integers(1, 64)
    ),
)
def test_lookup_finds_what_peft_finds(name: str, table: dict[str, int]) -> None:
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    assert patterns.lookup(table, name, 8) == table.get(get_pattern_key(list(table), name), 8)
