"""Runs an ONNX file in onnxruntime and the torch model it came from, on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ValidationError
from gauge_ext.export.adapters.declared import session_table
from gauge_ext.export.adapters.feeds import adapter_feeds
from gauge_ext.export.checks import require_count, require_packages
from gauge_ext.export.compare import compare
from gauge_ext.export.metadata import read_bounds
from gauge_ext.export.report import CaseResult, ValidationReport
from gauge_ext.export.session import open_session
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import Case, Limits, MakeInputs, make_cases
from gauge_ext.export.trace.inputs import BoundInputs, bind_inputs
from gauge_ext.export.trace.signature import output_leaves
from gauge_ext.models.adapted import every_parameter, unwrap

Progress = Callable[[str, float], None]  # what is being done, and the share that is done
Focus = Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]


class Runtime(Protocol):
    """What runs a graph.

    Attributes:
        name: Its name and version.
        seconds: How long the last run took by its own clock; None where ours will do.
    """

    name: str
    seconds: float | None

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs asked for, numpy arrays, for inputs by name."""
        ...


class DisagreementError(ValidationError):
    """An ONNX graph and its torch model disagree.

    Attributes:
        report: Every case and output, those that passed too.
    """

    def __init__(self, report: ValidationReport) -> None:
        failures = report.failures
        shown = "; ".join(failures[:3]) + ("; ..." if len(failures) > 3 else "")
        super().__init__(
            f"onnxruntime and torch disagree in {len(failures)} places: {shown}.",
            hint="Nothing was written. If the difference is acceptable, give a larger tolerance.",
        )
        self.report = report


def validate_onnx(
    path: str | Path,
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    tolerance: Tolerance | None = None,
    random_cases: int = 2,
    seed: int = 0,
    make_inputs: MakeInputs | None = None,
    cases: Mapping[str, Mapping[str, int]] | None = None,
    focus: Focus | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Compares an ONNX file with a torch model on the example, on other sizes and random inputs.

    The torch model is run as it is, in eval mode: with its adapters beside the weights if they are
    not merged, so that the merging is under test too. Which sizes may vary comes from the file:
    the named dimensions of its inputs.

    Args:
        path: The ONNX file; external data lies beside it.
        model: The model it was made from. It is not changed, not even its training flag.
        example_inputs: What the model is called with, a tuple or a dict.
        tolerance: The bar; by default by the narrowest floating-point dtype in model and output.
        random_cases: How many cases of random sizes and values, beside example, smallest, larger.
        seed: Of those.
        make_inputs: See :func:`gauge_ext.export.trace.cases.make_cases`.
        cases: Sizes by name of the case, instead of smallest, larger and random ones; needs
            ``make_inputs``.
        focus: Takes the part of an output that means something, where padding leaves the rest
            undefined: ``focus(output's name, output, inputs by name)``, applied to both sides.
        runtime: What runs the file; onnxruntime by default. Names and shapes of inputs are read by
            onnxruntime in any case.
        progress: Called with what is being done and the share done.

    Returns:
        The report. A difference is not an error here: look at ``report.passed``.

    Raises:
        ConfigError: the file is missing, the inputs do not fit, or torch itself refuses a case.
        ExportError: onnxruntime cannot load the file, or is not installed.
    """
    require_count("random_cases", random_cases)
    require_packages("onnxruntime")
    path = Path(path)
    session, runtime_name = open_session(path)
    run = session.run
    if runtime is not None:
        run, runtime_name = runtime.run, runtime.name
    reference = evaluation_copy(model)
    example = bind_inputs(reference, example_inputs)
    metadata = session.get_modelmeta().custom_metadata_map
    fixed = fixed_feeds(session, reference)
    shapes, feed_names = match_inputs(session, example, fixed)
    limits = Limits.of(reference)
    floors = float_dtypes(reference.parameters())
    plans = make_cases(
        reference,
        example,
        shapes,
        bounds=read_bounds(metadata),
        random_cases=random_cases,
        seed=seed,
        make_inputs=make_inputs,
        plans=cases,
    )
    output_names = [output.name for output in session.get_outputs()]
    usual = random_cases + (2 if any(isinstance(d, str) for s in shapes for d in s) else 0)
    total = 1 + (usual if cases is None else len(cases))
    results = []
    for index, case in enumerate(plans):
        if progress is not None:
            progress(f"validating: {case.name}", index / total)
        expected = _run_torch(reference, case)
        order = _match_outputs(output_names, [name for name, _ in expected])
        feeds = {
            name: tensor.detach().cpu().numpy()
            for name, tensor in zip(feed_names, case.inputs.tensors, strict=True)
        }
        try:
            found = run(output_names, feeds | fixed)
        # Any runtime may run here, and onnxruntime's exceptions have no common base but Exception.
        # What it says is the result of this case, which fails the report.
        except Exception as error:
            results.append(CaseResult(case.name, case.sizes, (), str(error).strip()))
            continue
        differences = []
        for name, position, actual in zip(output_names, order, found, strict=True):
            tensor, result = expected[position][1], torch.from_numpy(actual)
            if focus is not None and result.shape == tensor.shape:
                given = dict(zip(feed_names, case.inputs.tensors, strict=True))
                tensor, result = focus(name, tensor, given), focus(name, result, given)
            bar = tolerance or usual_tolerance(floors | float_dtypes([tensor]))
            differences.append(
                compare(
                    name,
                    tensor,
                    result,
                    bar,
                    logits=_holds_logits(name, expected[position][0], tensor, limits),
                )
            )
        results.append(CaseResult(case.name, case.sizes, tuple(differences)))
    if progress is not None:
        progress("validated", 1.0)
    return ValidationReport(path, runtime_name, tuple(results))


def fixed_feeds(session: Any, model: nn.Module) -> dict[str, Any]:
    """What a graph with inputs for adapters is fed, beside what the model is called with."""
    table = session_table(session)
    return {} if table is None else dict(adapter_feeds(table, model))


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the parameters; flags and buffers are its own.

    Raises:
        ConfigError: the model holds something that cannot be copied.
    """
    inner = unwrap(model)
    memo: dict[int, Any] = {id(p): p for p in every_parameter(inner)}
    try:
        return copy.deepcopy(inner, memo).eval()
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"this {type(inner).__name__} cannot be copied: {error}",
            hint="It holds an object that copy.deepcopy refuses; take that off the model first.",
        ) from error


def _run_torch(model: nn.Module, case: Case) -> list[tuple[str, Tensor]]:
    # A model may write into its inputs; onnxruntime must not see that.
    inputs = case.inputs.with_tensors([tensor.detach().clone() for tensor in case.inputs.tensors])
    try:
        with torch.no_grad():
            result = model(*inputs.args, **inputs.kwargs)
    # The user's own forward may raise anything; it is raised on with its class and its words.
    except Exception as error:
        sizes = ", ".join(f"{name}={size}" for name, size in case.sizes.items())
        raise ConfigError(
            f"torch itself refuses the case {case.name!r} ({sizes or 'sizes of the example'}): "
            f"{type(error).__name__}: {error}",
            hint="Give the sizes that the model takes, as torch.export.Dim(name, min=..., max=...)"
            " in dynamic_shapes, or pass make_inputs, which makes inputs that it takes.",
        ) from error
    return [(name, tensor.detach().cpu()) for name, tensor in output_leaves(result)]


def match_inputs(
    session: Any, example: BoundInputs, fixed: Mapping[str, Any]
) -> tuple[list[list[Any]], list[str]]:
    """Pairs the example's tensors with the graph's inputs: by name, or else by position.

    Returns:
        For each of the example's tensors the shape and the name of its input.

    Raises:
        ConfigError: there are more or fewer, or one has another shape.
    """
    shapes = {
        value.name: list(value.shape) for value in session.get_inputs() if value.name not in fixed
    }
    if len(shapes) != len(example.names):
        raise ConfigError(
            f"the file has {len(shapes)} inputs ({', '.join(shapes)}), the example has "
            f"{len(example.names)} tensors ({', '.join(example.names)}).",
            hint="Give exactly the inputs that the file was made with.",
        )
    feed_names = list(example.names if set(shapes) == set(example.names) else shapes)
    for name, tensor in zip(feed_names, example.tensors, strict=True):
        shape = shapes[name]
        fits = len(shape) == tensor.dim() and all(
            size == dim or not isinstance(dim, int)
            for size, dim in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"the file's input {name!r} has shape {shape}, the example's tensor "
                f"{tuple(tensor.shape)}.",
                hint="Give an example of the shape that the file was made for.",
            )
    return [shapes[name] for name in feed_names], feed_names


def _match_outputs(in_file: Sequence[str], in_torch: Sequence[str]) -> list[int]:
    """For each of the file's outputs the position of torch's: by name, or else by position."""
    if len(in_file) != len(in_torch):
        raise ConfigError(
            f"the file has {len(in_file)} outputs ({', '.join(in_file)}), the model returns "
            f"{len(in_torch)} ({', '.join(in_torch)}).",
            hint="Was the file made from this model?",
        )
    if set(in_file) == set(in_torch):
        return [in_torch.index(name) for name in in_file]
    return list(range(len(in_file)))


def _holds_logits(name: str, torch_name: str, tensor: Tensor, limits: Limits) -> bool:
    named = any(n.rpartition(".")[2].endswith("logits") for n in (name, torch_name))
    wide = limits.vocabulary is not None and tensor.dim() > 1
    return named or (wide and tensor.shape[-1] == limits.vocabulary)


def float_dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    """The floating-point dtypes among some tensors."""
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def usual_tolerance(dtypes: set[torch.dtype]) -> Tolerance:
    """That of the narrowest dtype: a float32 output of float16 weights is a float16 result."""
    if not dtypes:
        return Tolerance.for_dtype(torch.float32)
    return Tolerance.for_dtype(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
