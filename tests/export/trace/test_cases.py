from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.trace.cases import Case, Limits, make_cases
from gauge_ext.export.trace.inputs import bind_inputs


class Anything(nn.Module):
    def forward(self, **inputs: Tensor) -> Tensor:
        return next(iter(inputs.values()))


def cases_of(
    inputs: dict[str, Tensor], shapes: list[list[Any]], model: nn.Module | None = None, **more: Any
) -> list[Case]:
    model = model or Anything()
    options: dict[str, Any] = {"bounds": {}, "random_cases": 3, "seed": 0} | more
    return list(make_cases(model, bind_inputs(model, inputs), shapes, **options))


def text_model(**config: int) -> nn.Module:
    model = Anything()
    model.config = SimpleNamespace(**config)
    wrapper = Anything()
    wrapper.inner = model
    return wrapper


def test_other_sizes_than_the_examples():
    cases = cases_of({"x": torch.randn(2, 6, 3)}, [["batch", "sequence", 3]])
    assert [c.name for c in cases] == [
        "example",
        "smallest",
        "larger",
        *(f"random {i}" for i in (1, 2, 3)),
    ]
    assert cases[0].sizes == {"batch": 2, "sequence": 6}
    assert cases[1].sizes == {"batch": 1, "sequence": 1}
    assert cases[2].sizes == {"batch": 4, "sequence": 9}
    for case in cases:
        (x,) = case.inputs.tensors
        assert x.shape == (case.sizes["batch"], case.sizes["sequence"], 3)
        assert 1 <= case.sizes["batch"] <= 5


def test_a_seed_repeats_itself():
    x = {"x": torch.randn(2, 6)}
    first, again, other = (
        [case.inputs.tensors[0] for case in cases_of(x, [["n", 6]], seed=seed)]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])


def test_bounds_and_positions_are_kept():
    model = text_model(vocab_size=9, max_position_embeddings=7)
    cases = cases_of(
        {"x": torch.randn(5, 6)}, [["batch", "sequence"]], model, bounds={"batch": (3, 6)}
    )
    assert cases[1].sizes == {"batch": 3, "sequence": 1}
    assert cases[2].sizes == {"batch": 6, "sequence": 7}
    for case in cases[3:]:
        assert 3 <= case.sizes["batch"] <= 6
        assert case.sizes["sequence"] <= 7


def test_formulas_follow_from_the_other_sizes():
    shapes = [["batch", "past"], ["batch", "new"], ["batch", "past + new"]]
    sizes = [torch.zeros(2, n) for n in (3, 4, 7)]
    cases = cases_of(dict(zip("abc", sizes, strict=True)), shapes)
    for case in cases:
        a, b, c = case.inputs.tensors
        assert c.shape[1] == a.shape[1] + b.shape[1]
    assert set(cases[0].sizes) == {"batch", "past", "new"}


@pytest.mark.parametrize("formula", ["past + other", "Max(0, past)"])
def test_formulas_that_cannot_be_computed(formula):
    with pytest.raises(ConfigError, match="make_inputs"):
        cases_of({"a": torch.zeros(2), "b": torch.zeros(3)}, [["past"], [formula]])


def test_token_ids_masks_and_segments():
    model = text_model(vocab_size=11, type_vocab_size=2)
    ids = torch.full((2, 8), 3)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(8).expand(2, 8),
        "labels": torch.tensor([4, 7]),
    }
    cases = cases_of(inputs, [["b", "s"]] * 4 + [["b"]], model, random_cases=20)
    seen = {name: set() for name in inputs}
    for case in cases[1:]:
        for name, tensor in zip(case.inputs.names, case.inputs.tensors, strict=True):
            assert tensor.dtype == torch.long
            seen[name] |= set(tensor.flatten().tolist())
        mask, positions = case.inputs.tensors[1], case.inputs.tensors[3]
        assert (mask[0] == 1).all()
        assert (mask.diff(dim=1) <= 0).all()
        assert (mask.sum(1) >= 1).all()
        assert (positions == torch.arange(case.sizes["s"])).all()
    assert seen["input_ids"] == set(range(11))
    assert seen["attention_mask"] == {0, 1}
    assert seen["token_type_ids"] == {0, 1}
    assert seen["labels"] == {4, 7}


def test_values_stay_of_the_examples_kind():
    inputs = {
        "probabilities": torch.rand(50, 3),
        "placeholder": torch.ones(50, 3),
        "temperature": torch.tensor(0.7),
        "flags": torch.tensor([True, False] * 25),
        "half": torch.randn(50, dtype=torch.float16),
        "empty": torch.zeros(50, 0, dtype=torch.int32),
    }
    shapes = [["n", 3], ["n", 3], [], ["n"], ["n"], ["n", 0]]
    probabilities, placeholder, temperature, flags, half, empty = cases_of(inputs, shapes)[
        2
    ].inputs.tensors
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    assert placeholder.std() > 0.5
    assert temperature == inputs["temperature"]
    assert set(flags.tolist()) == {True, False}
    assert half.dtype == torch.float16
    assert (empty.shape, empty.dtype) == ((75, 0), torch.int32)


def test_limits_of_models():
    assert Limits.of(nn.Linear(2, 2)) == Limits(None, None, None)
    assert Limits.of(text_model(vocab_size=5, n_positions=9)) == Limits(5, None, 9)
    with_embeddings = Anything()
    with_embeddings.get_input_embeddings = lambda: nn.Embedding(6, 2)
    assert Limits.of(with_embeddings).vocabulary == 6


def test_limits_of_transformers(bert, llama):
    assert Limits.of(bert) == Limits(50, 2, 32)
    assert Limits.of(nn.Sequential(llama)) == Limits(50, None, 32)


def test_make_inputs_makes_them():
    def make(sizes: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.full((sizes["n"],), 8.0)}

    cases = cases_of({"x": torch.zeros(3)}, [["n"]], make_inputs=make)
    for case in cases[1:]:
        assert case.inputs.tensors[0].tolist() == [8.0] * case.sizes["n"]
    for wrong in ({"y": torch.zeros(2)}, {"x": torch.zeros(2).double()}):
        with pytest.raises(ConfigError, match="make_inputs must return inputs like the example"):
            cases_of({"x": torch.zeros(3)}, [["n"]], make_inputs=lambda s, g, w=wrong: w)
