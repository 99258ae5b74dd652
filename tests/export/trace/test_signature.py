from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.trace.inputs import bind_inputs
from gauge_ext.export.trace.signature import name_values, output_leaves


def test_outputs_of_every_kind():
    t = torch.zeros(1)
    for result, names in (
        (t, ["output"]),
        ((t, [t, None]), ["output_0", "output_1.0"]),
        ({"a": t, "b": (t,)}, ["a", "b.0"]),
    ):
        assert [name for name, _ in output_leaves(result)] == names


def test_outputs_of_transformers(bert, token_ids):
    result = bert(input_ids=token_ids, output_hidden_states=True)
    names = [name for name, _ in output_leaves(result)]
    assert names == [
        "last_hidden_state",
        "pooler_output",
        *(f"hidden_states.{layer}" for layer in range(3)),
    ]


def test_outputs_that_are_no_tensors():
    with pytest.raises(ExportError, match="returns a int in its output 'count'"):
        output_leaves({"y": torch.zeros(1), "count": 3})
    with pytest.raises(ExportError, match="returns no tensor"):
        output_leaves((None,))


def test_parameters_keep_their_names(names_clash):
    bound = bind_inputs(names_clash, (torch.zeros(2, 3), torch.zeros(3)))
    assert name_values(names_clash, bound, None, None) == (("x", "scale_in"), ("x_out", "linear"))
    assert name_values(names_clash, bound, ["a", "b"], ["x", "y"]) == (("a", "b"), ("x", "y"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((["a"], None), "input_names has 1 names, the model has 2: x, scale"),
        ((["a", "a"], None), "input_names must be different and not empty"),
        ((["a", "scale"], None), "'scale' is the name of a parameter or input"),
        ((None, ["x", ""]), "output_names must be different and not empty"),
        ((None, ["scale_in", "b"]), "'scale_in' is the name of a parameter or input"),
    ],
)
def test_names_that_cannot_be_used(names_clash, names, message):
    bound = bind_inputs(names_clash, (torch.zeros(2, 3), torch.zeros(3)))
    with pytest.raises(ConfigError, match=message):
        name_values(names_clash, bound, *names)


def test_an_example_on_which_the_model_fails():
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    model = Square()
    with pytest.raises(ConfigError, match="Square fails on example_inputs: RuntimeError: mat1"):
        name_values(model, bind_inputs(model, (torch.zeros(2, 3),)), None, None)
