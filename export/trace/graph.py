"""A torch model as an ONNX graph in which every parameter keeps its name and its layout.

torch.onnx's own optimizer (``optimize=True``) transposes weights at export time, and a weight
``query.weight (out, in)`` becomes ``val_60 (in, out)``: right, but nobody can find it again to
patch, quantize or merge an adapter into it. Here the exporter runs without it, and the same
onnxscript passes run afterwards while the parameters are graph inputs. An input has no value, so
no pass can fold, transpose, merge or drop one. onnxruntime transposes them when it loads the file.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.trace.axes import name_axes
from gauge_ext.export.trace.inputs import Axes, BoundInputs, Bounds, tree_of_shapes
from gauge_ext.export.trace.signature import name_values

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = range(17, 26)
# Which module a node came from is worth keeping for whoever reads the graph. The rest of what
# torch.onnx notes on nodes (stack traces with the paths of this machine) is not for publication.
_KEPT_METADATA = "pkg.torch.onnx.name_scopes"
_CHATTY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Graph:
    """An ONNX graph in memory; its weights still share storage with the torch model.

    Attributes:
        model: The graph.
        parameters: Initializer -> the names that the model gives this tensor, several if tied.
        bounds: Dynamic dimension -> the sizes that the model takes.
    """

    model: ir.Model
    parameters: dict[str, tuple[str, ...]]
    bounds: Bounds

    @property
    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name -> shape of each input, dynamic dimensions by name."""
        return {str(value.name): _shape(value) for value in self.model.graph.inputs}

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name -> shape of each output, dynamic dimensions by name."""
        return {str(value.name): _shape(value) for value in self.model.graph.outputs}

    @property
    def nbytes(self) -> int:
        """The size of all weights and constants."""
        values = self.model.graph.initializers.values()
        return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def require_opset(opset: int) -> None:
    """Refuses operator sets that torch cannot write.

    Raises:
        ConfigError: not an integer from 17 to 25.
    """
    if opset not in OPSETS:
        raise ConfigError(f"opset must be in {OPSETS[0]}..{OPSETS[-1]}, got {opset!r}.")


def build_graph(
    model: nn.Module,
    inputs: BoundInputs,
    axes: list[Axes],
    *,
    opset: int,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Graph:
    """Traces a model and translates it.

    Args:
        model: A model in eval mode, without adapters or with them (they are then part of the
            graph).
        inputs: Example inputs.
        axes: The axes of each input tensor that may vary.
        opset: Version of the default operator set, see :func:`require_opset`.
        input_names: Names for the graph's inputs; by default those of forward's parameters.
        output_names: Names for the outputs; by default the keys of what the model returns.

    Returns:
        The graph.

    Raises:
        ConfigError: the names cannot be used.
        ExportError: torch cannot trace or translate the model, or it returns what ONNX cannot
            hold.
    """
    names = name_values(model, inputs, input_names, output_names)
    program = _trace(model, _without_ones(inputs, axes), axes, opset)
    bounds = name_axes(program, axes)
    parameters = _optimize(program.model, model, *names)
    _clear_metadata(program.model)
    if program.model.opset_imports.get("") != opset:
        raise ExportError(
            f"this model cannot be written in opset {opset}: the converter stopped at "
            f"{program.model.opset_imports.get('')}.",
            hint="Use opset 18 or later.",
        )
    return Graph(program.model, parameters, bounds)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's notes on its own workings; errors stay what they are."""
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _without_ones(inputs: BoundInputs, axes: list[Axes]) -> BoundInputs:
    """The example with every dynamic axis of size 1 repeated once.

    torch.export takes a size of 1 for a constant (it broadcasts), so a batch of one, the most
    natural example, could never be dynamic.
    """
    tensors = []
    for tensor, entry in zip(inputs.tensors, axes, strict=True):
        times = [2 if axis in entry and size == 1 else 1 for axis, size in enumerate(tensor.shape)]
        tensors.append(tensor.repeat(times) if 2 in times else tensor)
    return inputs.with_tensors(tensors)


def _trace(
    model: nn.Module, inputs: BoundInputs, axes: list[Axes], opset: int
) -> torch.onnx.ONNXProgram:
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                inputs.args,
                kwargs=inputs.kwargs,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                dynamic_shapes=tree_of_shapes(inputs, axes) if any(axes) else None,
                verbose=False,
            )
    # torch raises dozens of classes from here, most of them private.
    except Exception as error:
        cause = _root_cause(error)
        if any(axes) and re.search(r"\bDim\b|[Cc]onstraint|speciali", cause):
            hint = (
                "If one of these axes cannot vary, leave it out of dynamic_shapes or give it the "
                "range that the model allows, as torch.export.Dim(name, min=..., max=...)."
            )
        elif type(error).__name__ == "TorchExportError":  # a private class
            hint = (
                "torch.export must be able to trace the model: see where it stops with "
                "torch.export.export(model, inputs)."
            )
        else:
            hint = "It was traced, but a part of it has no translation to ONNX in this opset."
        raise ExportError(
            f"torch cannot turn {type(model).__name__} into a graph: {cause}", hint=hint
        ) from error
    assert program is not None  # only the old exporter returns None
    return program


def _optimize(
    model: ir.Model, source: nn.Module, in_names: tuple[str, ...], out_names: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Simplifies the graph around the parameters, and names its inputs and outputs.

    Args:
        model: The graph; changed in place.
        source: The torch model it came from.
        in_names: Names for the inputs.
        out_names: Names for the outputs.

    Returns:
        Initializer -> the parameter's names. Parameters that the graph does not use are gone.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    graph = model.graph
    hidden: list[tuple[ir.Value, Any, tuple[str, ...]]] = []
    for names in _tied_names(source):
        values = [graph.initializers.pop(name) for name in names if name in graph.initializers]
        for copy in values[1:]:
            copy.replace_all_uses_with(values[0], replace_graph_outputs=True)
        hidden += [(value, value.const_value, names) for value in values[:1]]
    for value, _, _ in hidden:
        value.const_value = None
        graph.inputs.append(value)
    with quiet():
        optimizer.optimize_ir(model)

    _check_count("inputs", len(graph.inputs) - len(hidden), in_names)
    _check_count("outputs", len(graph.outputs), out_names)
    wanted = (*in_names, *(names[0] for _, _, names in hidden), *out_names)
    for value, name in zip((*graph.inputs, *graph.outputs), wanted, strict=True):
        value.name = name
    # Renames whatever inside the graph has one of these names; inputs and outputs go first.
    common.NameFixPass()(model)

    del graph.inputs[len(in_names) :]
    parameters = {}
    for value, tensor, names in hidden:
        if value.uses():
            value.const_value = tensor
            graph.register_initializer(value)
            parameters[names[0]] = names
    return parameters


def _check_count(what: str, found: int, names: tuple[str, ...]) -> None:
    if found != len(names):
        raise ExportError(
            f"torch's graph has {found} {what}, the model {len(names)}: {', '.join(names)}."
        )


def _tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """The keys of the state dict, those of one and the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            groups.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in groups.values()]


def _clear_metadata(model: ir.Model) -> None:
    from onnx_ir.traversal import RecursiveGraphIterator

    for node in RecursiveGraphIterator(model.graph):
        scopes = node.metadata_props.get(_KEPT_METADATA)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[_KEPT_METADATA] = scopes
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    if value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)


def _root_cause(error: BaseException) -> str:
    """The first words of the innermost error, without torch's colours and links."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = text.split("For more information about this error")[0].strip()
    short = text if len(text) <= 1500 else text[:1500] + " ..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__
