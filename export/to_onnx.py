"""The whole road: a torch model with an adapter becomes an ONNX file that was run and agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.codes import AdapterPrecision
from gauge_ext.export.adapters.feeds import feeds_by_case
from gauge_ext.export.adapters.graph import open_inputs, require_choice
from gauge_ext.export.adapters.layers import open_layers
from gauge_ext.export.adapters.table import AdapterForm, AdapterTable, Arrays
from gauge_ext.export.adapters.validate import validate_adapters
from gauge_ext.export.checks import require_count, require_exportable, require_packages
from gauge_ext.export.disk.files import staged_files
from gauge_ext.export.metadata import annotate, append_metadata, summary
from gauge_ext.export.metadata import provenance as provenance_of
from gauge_ext.export.precision.quantize import quantize_in_place
from gauge_ext.export.precision.quantize_methods import (
    Precision,
    QuantizationOptions,
    require_precision,
)
from gauge_ext.export.precision.quantize_report import QuantizationReport
from gauge_ext.export.report import ExportReport, ValidationReport
from gauge_ext.export.steps import Steps
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import MakeInputs, make_cases
from gauge_ext.export.trace.graph import build_graph, require_opset
from gauge_ext.export.trace.graph_file import check_file, save_graph
from gauge_ext.export.trace.inputs import bind_inputs, resolve_dynamic_shapes
from gauge_ext.export.validate import DisagreementError, Progress, validate_onnx
from gauge_ext.models import merged_copy
from gauge_ext.models.adapted import unwrap


def export_onnx(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    path: str | Path,
    *,
    mode: Literal["merged", "adapters"] = "merged",
    dynamic_shapes: Any = None,
    opset: int = 20,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
    validate: bool = True,
    tolerance: Tolerance | None = None,
    random_cases: int = 2,
    seed: int = 0,
    make_inputs: MakeInputs | None = None,
    provenance: Mapping[str, str] | None = None,
    adapter_targets: str | Sequence[str] | None = None,
    adapter_form: AdapterForm = "optional",
    adapter_precision: AdapterPrecision | None = None,
    adapter_part: bool = False,
    precision: Precision = "fp32",
    quantization: QuantizationOptions | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model with adapters as ONNX, merged or with inputs for them, and proves it right.

    Each adapted layer becomes one weight, ``W + scaling * lora_B @ lora_A``. Every parameter that
    the graph uses is an initializer under its name in the state dict and in its layout; tied
    parameters are stored once, under the first of their names. The file is written in a hidden
    folder beside the target, run there in onnxruntime against the *unmerged* torch model, and
    renamed only if it agrees. The caller's model is not changed.

    With ``mode="adapters"`` the file holds the base, and its linear layers take the factors of an
    adapter as inputs ``<layer>.lora_A (in, r)`` and ``<layer>.lora_B (r, out)``, of any rank r.
    :func:`~gauge_ext.export.write_onnx_adapter` makes the files for such a graph, and
    :class:`~gauge_ext.export.AdapterSession` runs it. Without an adapter its outputs are the plain
    base's, bit for bit. It is validated without an adapter and, where the model has one, with it.

    Args:
        model: Any module in float32, float64 or float16, with adapters or without.
        example_inputs: What the model is called with: a tuple (positional) or a dict (by name).
        path: The file to write. An existing file is replaced at the very end, or left untouched.
        mode: Whether adapters are merged into the weights or become inputs.
        dynamic_shapes: Which sizes may vary: None (none), ``"auto"`` (batch and sequence, as far
            as the model allows), or torch.export's form, ``{"x": {0: "batch"}}``.
        opset: Version of the default operator set, 17 to 25. From 23 on, attention is one node.
        input_names: Names of the graph's inputs; by default those of forward's parameters.
        output_names: Names of its outputs; by default the keys of what the model returns.
        external_data: Whether the weights go into a file of their own, ``path`` + ``.data``. None:
            if they exceed 1 GiB.
        validate: Whether to run the file before it is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        random_cases: How many cases of random sizes and values, beside example, smallest, larger.
        seed: Of those.
        make_inputs: Makes inputs for given sizes, for models that take no others:
            ``make_inputs({"batch": 3}, generator)`` returns what the model is called with.
        provenance: More metadata, text to text; written as ``gauge_ext.<key>``.
        adapter_targets: For ``mode="adapters"``: which layers take factors, as ``target_modules``
            of :class:`~gauge_ext.LoRAConfig`; None for those that have an adapter.
        adapter_form: For ``mode="adapters"``: "optional" gives the inputs defaults of rank 0, so
            that they may be left out (onnxruntime); "required" gives none (onnxruntime-web and
            -node, OpenVINO).
        adapter_precision: For ``mode="adapters"``: how factors are stored and fed, "float32",
            "float16" or "int8" (a scale for each of the r components); None for the layers' dtype.
        adapter_part: For ``mode="adapters"``: whether this is one of several graphs of the model,
            so that layers that are not part of it have their inputs in another.
        precision: How the weights are stored: "fp32" (as they are), "fp16", "int8", "int8-static"
            or "int4", see :func:`~gauge_ext.export.quantize_onnx`. The merged float32 graph is
            validated first; then it is quantized, and what that costs is measured against it.
        quantization: More about that, such as calibration inputs and how much may be lost.
        progress: Called with what is being done and the share done, in [0, 1].

    Returns:
        What was written, and the validation's report.

    Raises:
        ConfigError: an argument cannot be used, or torch itself refuses one of the cases.
        TargetError: with ``mode="adapters"``, a layer is none that can take factors as inputs.
        NonFiniteError: a weight, a factor or a merged weight holds NaN or infinity.
        ExportError: torch cannot trace or translate the model, onnxruntime cannot load the
            result, or a package is missing.
        ValidationError: onnxruntime and torch disagree; its ``report`` says where. Or fewer bits
            lose more than ``quantization.tolerance``.
        WriteError: the target cannot be written.
    """
    require_packages()
    require_opset(opset)
    require_count("random_cases", random_cases)
    _require_mode(mode, adapter_targets, adapter_form, adapter_precision)
    require_quantizable(model, precision, quantization)
    path = Path(path)
    source = unwrap(model)
    example = bind_inputs(source, example_inputs)
    # Tracing and running may write into them.
    example = example.with_tensors([tensor.detach().clone() for tensor in example.tensors])
    require_exportable(source, example)
    opened = open_layers(source, adapter_targets) if mode == "adapters" else None
    axes = resolve_dynamic_shapes(example, dynamic_shapes)
    steps = Steps(progress)
    found: ValidationReport | None = None
    lost: QuantizationReport | None = None
    with staged_files(path) as folder:
        draft = folder / path.name
        with steps.step("merge", "merging a copy", 0.0):
            said = provenance_of(source if opened is None else opened.base, provenance)
            merged = merged_copy(source).eval() if opened is None else opened.model
        with steps.step("graph", "tracing the graph", 0.05):
            adapter_inputs: dict[str, tuple[int | str, ...]] = {}
            graph = build_graph(
                merged,
                example,
                axes,
                opset=opset,
                input_names=input_names,
                output_names=output_names,
            )
            table: AdapterTable | None = None
            if opened is not None:
                form, stored = require_choice(adapter_form, adapter_precision, opened.compute)
                digest = said["base_sha256"]
                graph, table = open_inputs(graph, opened, form, stored, digest, part=adapter_part)
                adapter_inputs = {name: shape for name, (shape, _) in table.shapes.items()}
            written = annotate(graph, said)
        with steps.step("write", "writing", 0.6):
            save_graph(graph, draft, path, external_data)
        report = ExportReport(
            path=path,
            files=(),
            bytes_written=0,
            opset=opset,
            inputs={k: shape for k, shape in graph.inputs.items() if k not in adapter_inputs},
            outputs=graph.outputs,
            parameters=graph.parameters,
            provenance=written,
            adapter_inputs=adapter_inputs,
        )
        bounds = graph.bounds
        del merged, graph  # the file holds it all now; onnxruntime needs the memory
        if validate:
            with steps.step("validate", "validating", 0.7):
                check_file(draft)
                check = validate_onnx if opened is None else validate_adapters
                found = check(
                    draft,
                    source,
                    example_inputs,
                    tolerance=tolerance,
                    random_cases=random_cases,
                    seed=seed,
                    make_inputs=make_inputs,
                    progress=steps.within(0.7, 1.0),
                )
            found = replace(found, path=path)
            if not found.passed:
                raise DisagreementError(found)
        # What the file says of itself is what running it found, not what running another found.
        signed = {}
        if precision == "fp32":
            if found is not None:
                signed = summary(found)
                append_metadata(draft, signed)
        else:
            with steps.step("quantize", f"to {precision}", 0.9):
                cases = make_cases(
                    source,
                    example,
                    list(report.inputs.values()),
                    bounds=bounds,
                    random_cases=random_cases,
                    seed=seed,
                    make_inputs=make_inputs,
                )
                options = quantization or QuantizationOptions()
                more: dict[str, Arrays] = {"": {}}
                if table is not None:
                    more = feeds_by_case(table, source)
                    # Ranges with the adapter as well as without; zeros stand in for none.
                    options = replace(
                        options,
                        calibration=[
                            {**one, **arrays}
                            for one in options.calibration
                            for arrays in more.values()
                        ],
                    )
                feeds = (
                    (
                        case.name + suffix,
                        case.sizes,
                        {**dict(zip(report.inputs, case.arrays, strict=True)), **arrays},
                    )
                    for case in cases
                    for suffix, arrays in more.items()
                )
                lost = quantize_in_place(draft, path, precision, options, feeds)
            signed = lost.provenance
        report = replace(
            report,
            provenance={**report.provenance, **signed},
            files=tuple(path.with_name(file.name) for file in sorted(folder.iterdir())),
            bytes_written=sum(file.stat().st_size for file in folder.iterdir()),
            quantization=lost,
        )
    steps.tell("done", 1.0)
    return replace(report, seconds=steps.seconds, validation=found)


def _require_mode(mode: str, targets: object, form: str, precision: str | None) -> None:
    if mode not in {"merged", "adapters"}:
        raise ConfigError(f"mode must be 'merged' or 'adapters', got {mode!r}.")
    require_choice(form, precision)
    if mode == "merged" and (targets is not None or form != "optional" or precision is not None):
        raise ConfigError(
            "adapter_targets, adapter_form and adapter_precision are for mode='adapters', got "
            "mode='merged'.",
            hint="Leave them out, or give mode='adapters'.",
        )


def require_quantizable(
    model: nn.Module, precision: str, options: QuantizationOptions | None
) -> None:
    """Refuses, before any work, what cannot be brought to a precision.

    Raises:
        ConfigError: the precision or an option cannot be used, or the model is not in float32.
    """
    require_precision(precision, options or QuantizationOptions())
    if precision == "fp32":
        if options is not None:
            raise ConfigError("quantization is given, and precision is 'fp32'.")
        return
    if wide := [n for n, p in model.named_parameters() if p.dtype not in (torch.float32,)]:
        raise ConfigError(
            f"precision={precision!r} starts from float32, and {wide[0]!r} is "
            f"{model.get_parameter(wide[0]).dtype}.",
            hint="Convert a copy of the model first: model.float().",
        )
