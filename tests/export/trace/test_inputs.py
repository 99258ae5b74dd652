from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from gauge_ext.errors import ConfigError
from gauge_ext.export.trace.inputs import (
    axis_names,
    bind_inputs,
    bounds_of,
    named_leaves,
    resolve_dynamic_shapes,
    tree_of_shapes,
)


class Takes(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None, state: Any = None, flag=True):
        return ids


class TakesAny(nn.Module):
    def forward(self, *tensors: Tensor, **more: Tensor):
        return tensors[0]


x, y, z = torch.zeros(2, 3), torch.ones(2), torch.zeros(4)


def test_order_is_that_of_the_signature():
    for inputs in ((x, y, {"h": z}), {"state": {"h": z}, "mask": y, "ids": x}):
        bound = bind_inputs(Takes(), inputs)
        assert bound.names == ("ids", "mask", "state.h")
        assert [id(t) for t in bound.tensors] == [id(x), id(y), id(z)]
        assert list(bound.kwargs) == ["ids", "mask", "state"]


def test_a_mapping_that_is_no_dict():
    assert bind_inputs(Takes(), UserDict(ids=x)).names == ("ids",)


def test_star_arguments_stay_positional():
    bound = bind_inputs(TakesAny(), (x, y))
    assert bound.names == ("input_0", "input_1")
    assert bound.args == (x, y)
    assert bind_inputs(TakesAny(), {"other": z}).names == ("other",)


def test_constants_are_no_inputs_and_survive_new_tensors():
    bound = bind_inputs(Takes(), {"ids": x, "flag": False, "state": (y, [z, None])})
    assert bound.names == ("ids", "state.0", "state.1.0")
    other = bound.with_tensors([x + 1, y + 1, z + 1])
    assert other.kwargs["flag"] is False
    assert torch.equal(other.kwargs["state"][1][0], z + 1)
    assert torch.equal(bound.kwargs["ids"], x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (x, r"must be a tuple .* got Tensor.*\(x,\)"),
        ({"ids": x, "idz": x}, r"does not fit Takes\.forward\(ids, mask, state, flag\):.*'idz'"),
        ((), "missing a required argument: 'ids'"),
        ((1, 2), "holds no tensor"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ConfigError, match=message):
        bind_inputs(Takes(), inputs)


class Pair(NamedTuple):
    first: Any
    second: Any


def test_named_leaves_of_every_container():
    tree = {"a": [1, (2,)], "b": Pair(3, {"c": 4}), "d": None}
    assert list(named_leaves(tree)) == [
        ("a.0", 1),
        ("a.1.0", 2),
        ("b.first", 3),
        ("b.second.c", 4),
        ("d", None),
    ]


def test_shapes_in_every_form_of_torchs():
    bound = bind_inputs(Takes(), {"ids": x, "state": [y, {"h": z}], "flag": False})
    expected = [{0: "batch"}, {0: "batch"}, {}]
    for form in (
        {"ids": {0: "batch"}, "state": [{0: "batch"}, {"h": None}]},
        {"ids": ("batch", None), "state": [["batch"], {"h": {}}], "flag": None},
        ({0: "batch"}, [{0: "batch"}, {"h": None}]),
    ):
        assert [axis_names(entry) for entry in resolve_dynamic_shapes(bound, form)] == expected
    axes = resolve_dynamic_shapes(bound, {"ids": {0: "batch"}, "state": [{0: Dim("b")}, {"h": {}}]})
    assert tree_of_shapes(bound, axes) == {
        "ids": {0: Dim.DYNAMIC},
        "state": [{0: axes[1][0]}, {"h": {}}],
        "flag": None,
    }
    assert resolve_dynamic_shapes(bound, None) == [{}, {}, {}]


def test_auto_is_batch_and_sequence():
    ids = torch.zeros(2, 5, dtype=torch.long)
    bound = bind_inputs(
        TakesAny(), {"a": ids, "b": ids, "c": ids[:, :3], "d": x, "e": torch.ones(7, 5), "f": y[0]}
    )
    assert [axis_names(entry) for entry in resolve_dynamic_shapes(bound, "auto")] == [
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "c_sequence"},
        {0: "batch"},
        {},
        {},
    ]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("dynamic", "None, 'auto' or torch.export's form"),
        (3, "a mapping or a sequence, got int"),
        ({"idz": {0: "batch"}}, r"'idz', which is not among the inputs \(ids, mask, flag\)"),
        ((None,) * 4, "4 entries for 3 inputs"),
        ({"ids": {2: "batch"}}, r"axis 2, and the tensor has shape \(2, 3\)"),
        ({"ids": {-1: "batch"}}, "axis -1"),
        ({"ids": "batch"}, r"must be \{axis: name\} or None, got 'batch'"),
        ({"flag": {0: "batch"}}, r"gives axes to 'flag', which holds a bool"),
        ({"ids": {0: "n"}, "mask": {0: "m"}, "flag": None}, None),
        ({"ids": {1: "n"}, "mask": {0: "n"}}, "calls two sizes 'n': 3 in 'ids' and 2 in 'mask'"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    bound = bind_inputs(Takes(), {"ids": x, "mask": y, "flag": True})
    if message is None:
        resolve_dynamic_shapes(bound, shapes)
        return
    with pytest.raises(ConfigError, match=message):
        resolve_dynamic_shapes(bound, shapes)


def test_shapes_that_nest_otherwise():
    bound = bind_inputs(Takes(), {"ids": x, "state": {"h": y}})
    with pytest.raises(ConfigError, match="'state' does not nest as the input does"):
        resolve_dynamic_shapes(bound, {"state": [{0: "batch"}]})


def test_bounds_are_those_of_dims():
    axes = [{0: Dim("batch", max=8), 1: "free"}, {0: Dim("open"), 1: Dim("narrow", min=4, max=6)}]
    assert bounds_of(axes) == {"batch": (1, 8), "open": (1, None), "narrow": (4, 6)}
