"""Graphs in memory: names, ties, what is left out, axes."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.trace.graph import Graph, build_graph, quiet, require_opset
from gauge_ext.export.trace.inputs import bind_inputs, resolve_dynamic_shapes


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...], shapes: object = None) -> Graph:
    example = bind_inputs(model, inputs)
    return build_graph(model.eval(), example, resolve_dynamic_shapes(example, shapes), opset=20)


class Tied(nn.Module):
    """One matrix under three names, a zero bias, a parameter that is a scalar zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        nn.init.zeros_(self.second.bias)
        self.table = self.first.weight
        self.shift = nn.Parameter(torch.zeros(()))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.shift + self.table[0]


def test_tied_and_trivial_parameters_survive():
    graph = graph_of(Tied(), (torch.randn(2, 4),))
    assert graph.parameters == {
        "table": ("table", "first.weight", "second.weight"),
        "shift": ("shift",),
        "first.bias": ("first.bias",),
        "second.bias": ("second.bias",),
    }
    stored = graph.model.graph.initializers
    assert set(graph.parameters) <= set(stored)
    assert tuple(stored["table"].const_value.shape) == (4, 4)
    assert graph.nbytes < 2 * 4 * (16 + 8 + 1)


def test_batch_norm_keeps_its_parts():
    """onnxscript's rules would fold it into the convolution, and two names would be gone."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[1].running_mean.normal_()
    graph = graph_of(model, (torch.randn(2, 2, 5),))
    used = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(graph.parameters) == used


def test_names_that_clash(names_clash):
    graph = graph_of(names_clash, (torch.randn(2, 3), torch.randn(3)), {"x": {0: "batch"}})
    assert graph.inputs == {"x": ("batch", 3), "scale_in": (3,)}
    assert graph.outputs == {"x_out": ("batch", 3), "linear": ("batch", 3)}
    assert graph.parameters == {"scale": ("scale",)}
    values = [value.name for node in graph.model.graph for value in node.outputs]
    names = [*values, *graph.inputs, *graph.model.graph.initializers]
    assert len(names) == len(set(names))


def test_axes_that_the_model_fixes_or_limits():
    class Fixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.reshape(4, 3).sum() + y[3:]

    rows = torch.export.Dim("rows", min=5, max=9)
    shapes = {"x": {0: torch.export.Dim.AUTO}, "y": {0: rows}}
    graph = graph_of(Fixed(), (torch.randn(4, 3), torch.randn(7)), shapes)
    assert graph.inputs["y"] == ("rows",)
    assert graph.bounds == {"rows": (5, 9)}
    auto = graph_of(Fixed(), (torch.randn(4, 3), torch.randn(4)), "auto")
    assert auto.inputs["x"] == (4, 3)


def test_sizes_that_add_up_keep_the_formula():
    class Cat(nn.Module):
        def forward(self, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat([past, new]), past

    shapes = {"past": {0: "past"}, "new": {0: "new"}}
    graph = graph_of(Cat(), (torch.randn(3), torch.randn(2)), shapes)
    assert graph.inputs == {"past": ("past",), "new": ("new",)}
    assert {*graph.outputs["output_0"][0].replace(" ", "").split("+")} == {"past", "new"}


@pytest.mark.parametrize("opset", [16, 26, "20", None])
def test_opsets(opset):
    require_opset(20)
    with pytest.raises(ConfigError, match=r"opset must be in 17\.\.25"):
        require_opset(opset)


def test_quiet_is_over_when_it_is_over(capfd):
    logger = logging.getLogger("torch.onnx")
    level = logger.level

    def fail() -> None:
        with quiet():
            warnings.warn("chatter", UserWarning, stacklevel=1)
            logger.error("chatter")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert logger.level == level
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserWarning):
        warnings.warn("news", UserWarning, stacklevel=1)
