"""Inputs of other sizes and other values, made from one example.

An exporter can bake the example's batch size, sequence length or even values into the graph, and a
comparison on the example alone will never tell. So there is a smallest case, a larger one, and
random ones; all but the first have new values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.trace.expressions import evaluate, names_in
from gauge_ext.export.trace.inputs import BoundInputs, Bounds, bind_inputs

MakeInputs = Callable[[dict[str, int], torch.Generator], tuple[Any, ...] | Mapping[str, Any]]
Shape = Sequence[int | str | None]  # of a graph input: sizes, names, formulas of names


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: ``example``, ``smallest``, ``larger`` or ``random N``.
        sizes: The size of each dynamic dimension.
        inputs: What to call the model with.
    """

    name: str
    sizes: dict[str, int]
    inputs: BoundInputs

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """The tensors as onnxruntime takes them, in the order of the graph's inputs."""
        return [tensor.detach().cpu().numpy() for tensor in self.inputs.tensors]


@dataclass(frozen=True)
class Limits:
    """What is known about the values and sizes that a model takes, read off its config.

    Attributes:
        vocabulary: Token ids are below this.
        segments: Token type ids are below this.
        positions: No sequence is longer than this.
    """

    vocabulary: int | None
    segments: int | None
    positions: int | None

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        """Looks at the first transformers config in the model, then at its input embeddings."""
        configs = (getattr(module, "config", None) for module in model.modules())
        config = next((c for c in configs if hasattr(c, "vocab_size") or _has_text(c)), None)
        if config is not None and _has_text(config):
            config = config.get_text_config()
        vocabulary = _integer(config, "vocab_size")
        embeddings = getattr(model, "get_input_embeddings", None)
        if vocabulary is None and callable(embeddings):
            try:
                vocabulary = _integer(embeddings(), "num_embeddings")
            except NotImplementedError:  # transformers' way of saying that there are none
                vocabulary = None
        positions = (_integer(config, key) for key in ("max_position_embeddings", "n_positions"))
        return cls(
            vocabulary,
            _integer(config, "type_vocab_size"),
            next((p for p in positions if p is not None), None),
        )


def make_cases(
    model: nn.Module,
    example: BoundInputs,
    shapes: Sequence[Shape],
    *,
    bounds: Bounds,
    random_cases: int,
    seed: int,
    make_inputs: MakeInputs | None = None,
    plans: Mapping[str, Mapping[str, int]] | None = None,
) -> Iterator[Case]:
    """Yields the example, then other sizes, then random ones.

    Args:
        model: Whose inputs they are.
        example: The example.
        shapes: For each tensor of the example the shape of its graph input: sizes, names of
            dynamic dimensions, formulas of names.
        bounds: Least and largest size of a dimension, where the user gave them.
        random_cases: How many random cases.
        seed: Of sizes and values.
        make_inputs: Makes inputs for given sizes, where the rules here do not know enough. Called
            with the sizes by name and a generator; returns what the model is called with.
        plans: Sizes by name of the case, instead of the usual ones.

    Raises:
        ConfigError: a formula cannot be computed, or ``make_inputs`` returned something else than
            the example has.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = Limits.of(model)
    sizes = _example_sizes(example, shapes)
    yield Case("example", sizes, example)
    if plans is None:
        ranges = {name: _range(name, bounds, limits) for name in sizes}
        plans = _usual_plans(sizes, ranges, random_cases, generator)
    for name, plan in plans.items():
        if make_inputs is not None:
            inputs = bind_inputs(model, make_inputs(dict(plan), generator), "make_inputs's result")
            _check_alike(inputs, example)
        else:
            inputs = example.with_tensors(
                [
                    _draw(tensor_name, tensor, _sizes_of(tensor, shape, plan), limits, generator)
                    for tensor_name, tensor, shape in zip(
                        example.names, example.tensors, shapes, strict=True
                    )
                ]
            )
        yield Case(name, dict(plan), inputs)


def _usual_plans(
    sizes: dict[str, int],
    ranges: dict[str, tuple[int, int]],
    random_cases: int,
    generator: torch.Generator,
) -> dict[str, dict[str, int]]:
    plans: dict[str, dict[str, int]] = {}
    if sizes:
        plans["smallest"] = {name: ranges[name][0] for name in sizes}
        plans["larger"] = _larger(sizes, ranges)
    for number in range(random_cases):
        drawn = {}
        for name, size in sizes.items():
            low, high = ranges[name]
            top = max(low, min(high, 2 * size + 1))
            drawn[name] = int(torch.randint(low, top + 1, (), generator=generator))
        plans[f"random {number + 1}"] = drawn
    return plans


def _example_sizes(example: BoundInputs, shapes: Sequence[Shape]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    formulas: list[str] = []
    for tensor, shape in zip(example.tensors, shapes, strict=True):
        for size, dim in zip(tensor.shape, shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                sizes.setdefault(dim, size)
            elif isinstance(dim, str):
                formulas.append(dim)
    for formula in formulas:
        try:
            unknown = names_in(formula) - set(sizes)
        except ValueError as error:
            raise ConfigError(
                f"the graph has an input of size {formula!r}, which is no simple formula.",
                hint="Pass make_inputs, a function that makes inputs for given sizes.",
            ) from error
        # A size of its own that only ever appears in a formula: its value is not known.
        if unknown:
            raise ConfigError(
                f"the graph has an input of size {formula!r}, and no input has the size "
                f"{sorted(unknown)[0]!r} alone.",
                hint="Pass make_inputs, a function that makes inputs for given sizes.",
            )
    return sizes


def _range(name: str, bounds: Bounds, limits: Limits) -> tuple[int, int]:
    low, high = bounds.get(name, (1, None))
    cap = limits.positions if limits.positions is not None else 2**31
    # A batch is not a position, but no case needs a batch beyond the longest sequence either.
    return low, max(low, min(cap, high) if high is not None else cap)


def _larger(sizes: dict[str, int], ranges: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Half as large again, if possible; different from one another and from what was traced.

    At least two more: an example of size one was traced with size two.
    """
    result: dict[str, int] = {}
    for name, size in sizes.items():
        low, high = ranges[name]
        grown = size + max(2, size // 2)
        while grown in result.values():
            grown += 1
        result[name] = max(low, min(high, grown))
    return result


def _sizes_of(tensor: Tensor, shape: Shape, sizes: Mapping[str, int]) -> list[int]:
    return [
        evaluate(dim, sizes) if isinstance(dim, str) else size
        for size, dim in zip(tensor.shape, shape, strict=True)
    ]


def _draw(
    name: str, example: Tensor, size: list[int], limits: Limits, generator: torch.Generator
) -> Tensor:
    """Values of the same kind as the example's, judged by name, dtype and the values there."""
    last = name.rpartition(".")[2]
    if "mask" in last and len(size) == 2:
        drawn = _prefix_mask(size, generator)
    elif example.dim() == 0:
        return example
    elif example.dtype == torch.bool:
        drawn = torch.rand(size, generator=generator) < 0.5
    elif example.is_floating_point():
        drawn = _floats(example.detach().cpu().double(), size, generator)
    elif last.endswith("input_ids") and limits.vocabulary is not None:
        drawn = torch.randint(0, limits.vocabulary, size, generator=generator)
    elif last.endswith("token_type_ids") and limits.segments is not None:
        drawn = torch.randint(0, limits.segments, size, generator=generator)
    elif _counts_up(example):
        drawn = torch.arange(size[-1]).expand(size)
    elif example.numel():
        pick = torch.randint(0, example.numel(), size, generator=generator)
        drawn = example.detach().cpu().reshape(-1)[pick]
    else:
        drawn = torch.zeros(size)
    return drawn.to(example.device, example.dtype)


def _prefix_mask(size: list[int], generator: torch.Generator) -> Tensor:
    """Ones, then zeros: rows padded on the right to the longest, as tokenizers make them."""
    rows, columns = size
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    if rows:
        lengths[0] = columns
    return torch.arange(columns)[None, :] < lengths[:, None]


def _floats(example: Tensor, size: list[int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    finite = example[example.isfinite()]
    if finite.numel() < 2 or float(finite.std()) == 0.0:
        return noise  # a placeholder such as torch.ones(2, 3) says nothing about real values
    # Clamped, so that probabilities and pixels stay what they are.
    drawn = noise * finite.std() + finite.mean()
    return drawn.clamp(finite.min(), finite.max())


def _counts_up(example: Tensor) -> bool:
    columns = torch.arange(example.shape[-1], device=example.device)
    return example.shape[-1] > 1 and bool((example == columns).all())


def _check_alike(inputs: BoundInputs, example: BoundInputs) -> None:
    found = [(name, t.dtype) for name, t in zip(inputs.names, inputs.tensors, strict=True)]
    wanted = [(name, t.dtype) for name, t in zip(example.names, example.tensors, strict=True)]
    if found != wanted:
        raise ConfigError(f"make_inputs must return inputs like the example: {wanted}, got {found}")


def _has_text(config: Any) -> bool:
    return callable(getattr(config, "get_text_config", None))


def _integer(holder: Any, key: str) -> int | None:
    value = getattr(holder, key, None)
    return value if isinstance(value, int) and value > 0 else None
