"""The road of every model that generates: its graphs into a folder, run there, put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gauge_ext.errors import ExportError
from gauge_ext.export.adapters.codes import AdapterPrecision
from gauge_ext.export.adapters.file import read_table
from gauge_ext.export.adapters.table import AdapterForm
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.files import staged_folder
from gauge_ext.export.language.calibration import Calibration
from gauge_ext.export.language.calibration_prompts import prompts_of
from gauge_ext.export.language.fewer_bits import NO_BAR, quantize_graph
from gauge_ext.export.language.loop import Generated, Sample, run_generation, run_loop
from gauge_ext.export.language.model_folder import settle, write_manifest, write_settings
from gauge_ext.export.language.model_report import ModelReport, placed, report_of
from gauge_ext.export.precision.quantize_methods import Precision, QuantizationOptions
from gauge_ext.export.precision.quantize_report import QuantizationReport
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import ExportReport, ValidationReport
from gauge_ext.export.steps import within
from gauge_ext.export.to_onnx import export_onnx, require_quantizable
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.validate import DisagreementError, Progress

Axes = Mapping[str, Any]  # of a step's inputs, in torch.export's form


@dataclass(frozen=True)
class Kind:
    """What a model that generates becomes.

    Attributes:
        task: ``text-generation`` or ``seq2seq``.
        model: The model, without what wraps it.
        subjects: Folder and seed -> its graphs, and what they have to equal.
        axes: For each of them which axes vary.
        sample: Seed -> the tokens of the loop.
        settings: The first graph's report -> more files, name and what to write as JSON.
    """

    task: str
    model: nn.Module
    subjects: Callable[[Path, int], Sequence[Subject]]
    axes: Sequence[Axes]
    sample: Callable[[int], Sample]
    settings: Callable[[ExportReport], dict[str, Any]]

    def whole(self, folder: Path, tolerance: Tolerance | None, seed: int) -> ValidationReport:
        """The graphs of a folder in a loop against the plain model."""
        last = self.subjects(folder, seed)[-1].path.name
        return run_loop(folder, last, self.model, self.sample(seed), tolerance)


@dataclass(frozen=True)
class GraphOptions:
    """What is handed on to :func:`gauge_ext.export.export_onnx`, whose arguments these are."""

    opset: int
    external_data: bool | None
    mode: Literal["merged", "adapters"]
    adapter_targets: str | Sequence[str] | None
    adapter_form: AdapterForm
    adapter_precision: AdapterPrecision | None


def export_folder(
    kind: Kind,
    folder: Path,
    options: GraphOptions,
    *,
    source: Path | None,
    precision: Precision,
    quantization: QuantizationOptions | None,
    validate: bool,
    tolerance: Tolerance | None,
    seed: int,
    provenance: Mapping[str, str] | None,
    progress: Progress | None,
) -> ModelReport:
    """Writes the graphs of a model that generates, and what belongs to them.

    Args:
        kind: The model.
        folder: The folder to write; it must not exist or be empty.
        options: Of the graphs.
        source: The folder that the model was loaded from, for its tokenizer.
        precision: How the weights are stored.
        quantization: More about that.
        validate: Whether to run the graphs before the folder is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        seed: Of the inputs that they run on.
        provenance: More metadata, text to text.
        progress: Called with what is being done and the share done.

    Raises:
        ConfigError: the precision cannot be had for this model, or a calibration set does not fit.
        ExportError: torch cannot translate it, a layer that is to take an adapter is in no graph,
            onnxruntime cannot load a graph, or a package is missing.
        ValidationError: onnxruntime and torch disagree.
        WriteError: the folder cannot be written.
    """
    require_packages()
    require_quantizable(kind.model, precision, quantization)
    quantize = quantization or QuantizationOptions()
    static = precision == "int8-static"
    prompts = prompts_of(kind.model, kind.sample(seed), quantize.calibration) if static else []
    tell = progress or (lambda what, share: None)
    with staged_folder(folder) as draft:
        subjects = kind.subjects(draft, seed)
        reports = []
        for index, (subject, axes) in enumerate(zip(subjects, kind.axes, strict=True)):
            start, part = 0.6 * index / len(subjects), 0.6 / len(subjects)
            reports.append(
                export_onnx(
                    subject.module,
                    subject.example,
                    subject.path,
                    dynamic_shapes=axes,
                    validate=False,
                    provenance={"task": kind.task, **(provenance or {})},
                    progress=within(tell, start, start + part),
                    adapter_part=options.mode == "adapters" and len(subjects) > 1,
                    **vars(options),
                )
            )
        if options.mode == "adapters":
            _require_homes(subjects)
        found: Sequence[ValidationReport | None] = [None] * len(subjects)
        whole = None
        if validate:
            found, whole = judge(
                kind,
                draft,
                tolerance,
                seed,
                within(tell, 0.6, 1.0),
            )
            for judged in (*found, whole):
                if judged is not None and not judged.passed:
                    raise DisagreementError(placed(judged, folder))
        lost: list[QuantizationReport | None] = [None] * len(subjects)
        measured = None
        generated: tuple[Generated, ...] = ()
        if precision != "fp32":
            tell(f"to {precision}", 0.9)
            runs = Calibration(draft, kind.model, prompts) if static else None
            lost = [
                quantize_graph(one, folder, precision, quantize, seed, runs) for one in subjects
            ]
        if validate:
            if precision != "fp32":
                measured = kind.whole(draft, NO_BAR, seed)
            generated = run_generation(draft, kind.model, kind.sample(seed))
        graphs = []
        for index, report in enumerate(reports):
            # What the graphs did together stands in the last, which is the decoder's.
            last = index == len(reports) - 1
            both, wrote = (whole, generated or None) if last else (None, None)
            graphs.append(settle(report, draft, found[index], both, lost[index], wrote))
        write_settings(kind.model, draft, source, kind.settings(reports[0]))
        write_manifest(draft, kind.task, graphs)
        return report_of(draft, folder, kind.task, graphs, whole, measured, generated)


def judge(
    kind: Kind, folder: Path, tolerance: Tolerance | None, seed: int, progress: Progress | None
) -> tuple[list[ValidationReport], ValidationReport]:
    """Compares the graphs of a folder with a model, one by one and in a loop."""
    tell = progress or (lambda what, share: None)
    subjects = kind.subjects(folder, seed)
    total = len(subjects) + 1
    found = [
        subject.validate(
            tolerance=tolerance,
            seed=seed,
            progress=within(tell, index / total, (index + 1) / total),
        )
        for index, subject in enumerate(subjects)
    ]
    return found, kind.whole(folder, tolerance, seed)


def _require_homes(subjects: Sequence[Subject]) -> None:
    """Whether each layer that is to take an adapter has its inputs in one of the graphs."""
    tables = [read_table(subject.path) for subject in subjects]
    homes = {name for table in tables for name in table.inputs}
    if homeless := [name for table in tables for name in table.elsewhere if name not in homes]:
        raise ExportError(
            f"{len(homeless)} of the layers that are to take an adapter are in no graph, the "
            f"first of them {homeless[0]!r}: no output depends on them.",
            hint="Leave them out of adapter_targets.",
        )
