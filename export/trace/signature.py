"""The names of a graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.trace.inputs import BoundInputs, named_leaves


def name_values(
    model: nn.Module,
    inputs: BoundInputs,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Decides what the inputs and outputs of a model's graph are called.

    By default what Python calls them: the parameters of forward, and the keys of what it returns.
    A parameter of the model keeps its name whatever happens, so an input of the same name gets the
    suffix ``_in``, and an output named like an input or a parameter ``_out``.

    Args:
        model: The model; it is run once, to see what it returns.
        inputs: Its example inputs.
        input_names: The user's names, or None.
        output_names: The user's names, or None.

    Returns:
        Names of the inputs, names of the outputs.

    Raises:
        ConfigError: the model fails on the inputs, or the user's names are too few, too many, not
            different, or taken.
        ExportError: the model returns what ONNX cannot hold.
    """
    try:
        with torch.no_grad():
            result = model(*inputs.args, **inputs.kwargs)
    # Whatever the user's own forward raises.
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} fails on example_inputs: {type(error).__name__}: {error}",
            hint="Give inputs with which the model itself runs.",
        ) from error
    returned = tuple(name for name, _ in output_leaves(result))
    taken = set(model.state_dict())
    ins = _names("input_names", input_names, inputs.names, taken, "_in")
    return ins, _names("output_names", output_names, returned, taken.union(ins), "_out")


def output_leaves(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors that a model returned, by name: a ModelOutput's keys, a dict's, or positions.

    Raises:
        ExportError: something in it is neither a tensor nor None.
    """
    leaves = []
    for path, leaf in named_leaves(result):
        if isinstance(leaf, Tensor):
            leaves.append((path, leaf))
        elif leaf is not None:
            raise ExportError(
                f"the model returns a {type(leaf).__name__} in its output"
                f"{f' {path!r}' if path else ''}, and an ONNX graph returns tensors.",
                hint="Switch it off (transformers: config.use_cache = False) or wrap the model in "
                "a module that returns tensors only.",
            )
    if not leaves:
        raise ExportError("the model returns no tensor.", hint="Return at least one.")
    return [(_output_name(path), leaf) for path, leaf in leaves]


def _output_name(path: str) -> str:
    if not path:
        return "output"
    return f"output_{path}" if path[0].isdigit() else path


def _names(
    what: str, given: Sequence[str] | None, found: tuple[str, ...], taken: set[str], suffix: str
) -> tuple[str, ...]:
    """The names to use: those given, or those found with a suffix where they are taken."""
    if given is None:
        return tuple(name + suffix if name in taken else name for name in found)
    names = tuple(given)
    if len(names) != len(found):
        raise ConfigError(
            f"{what} has {len(names)} names, the model has {len(found)}: {', '.join(found)}."
        )
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{what} must be different and not empty, got {', '.join(names)}.")
    if clashes := sorted(taken.intersection(names)):
        raise ConfigError(f"{what}: {clashes[0]!r} is the name of a parameter or input already.")
    return names
