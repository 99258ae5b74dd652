"""When a parameter may be written to: never while anything else could see its elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack

from gauge_ext.adapters.ownership import is_held_alone


def linear() -> nn.Linear:
    return nn.Linear(3, 3)


def test_a_parameter_that_only_its_layer_holds() -> None:
    layer = linear()
    assert is_held_alone(layer, "weight")
    layer(torch.randn(2, 3)).sum().backward()
    layer.to(torch.bfloat16)
    assert is_held_alone(layer, "weight")
    assert not is_held_alone(layer, "nothing")


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: layer.weight,
        lambda layer: layer.weight.data,
        lambda layer: layer.weight.detach()[0],
        lambda layer: layer.weight.untyped_storage(),
        lambda layer: to_dlpack(layer.weight.detach()),
        lambda layer: layer.state_dict(),
        lambda layer: torch.optim.SGD(layer.parameters(), lr=1.0),
        lambda layer: layer(torch.randn(2, 3, requires_grad=True)),
    ],
    ids=["object", "data", "view", "storage", "dlpack", "state dict", "SGD", "graph"],
)
def test_whoever_else_holds_it_is_seen(hold: Callable[[nn.Linear], Any]) -> None:
    layer = linear()
    held = hold(layer)
    assert not is_held_alone(layer, "weight")
    del held
    assert is_held_alone(layer, "weight")


def test_what_numpy_had_is_left_alone_for_good() -> None:
    layer = linear()
    layer.weight.detach().numpy()  # torch itself marks such a storage
    assert not is_held_alone(layer, "weight")


def test_a_tied_layer_is_seen() -> None:
    layer, other = linear(), linear()
    other.weight = layer.weight
    assert not is_held_alone(layer, "weight")


def test_memory_of_others_is_seen(tmp_path: Any) -> None:
    def with_weight(values: Tensor) -> nn.Linear:
        layer = linear()
        layer.weight = nn.Parameter(values)
        return layer

    file = tmp_path / "w"
    numpy.ones((3, 3), numpy.float32).tofile(file)
    mapped = torch.from_file(str(file), shared=True, size=9, dtype=torch.float32).view(3, 3)
    array = torch.from_numpy(numpy.ones((3, 3), numpy.float32))
    for values in (mapped, array, torch.ones(3, 3).share_memory_()):
        assert not is_held_alone(with_weight(values.clone().share_memory_()), "weight")
        layer = with_weight(values)
        del values
        assert not is_held_alone(layer, "weight")
