"""``gauge-ext export`` and ``gauge-ext validate``: the road to ONNX, and the check on its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.base import Inputs, add_adapter, check_adapter, example_inputs, load_base
from gauge_ext.cli.console import stdout, working
from gauge_ext.cli.files import check_target, write_text
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.cli.quantize import quantization_options
from gauge_ext.errors import TargetError, ValidationError, WriteError

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.export import ExportReport, Tolerance, ValidationReport

Architecture = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="Load a transformers folder as this class (such as BertModel) instead of the one "
        "that its config names.",
        show_default=False,
    ),
]
# What to change when an export fails; anything else is the model's.
_OPTIONS = {WriteError: "--out", ValidationError: "--tolerance", TargetError: "--targets"}


class Mode(StrEnum):
    """What becomes of the adapter."""

    MERGED = "merged"
    ADAPTERS = "adapters"


class Form(StrEnum):
    """``gauge_ext.export.adapter_table.FORMS``."""

    OPTIONAL = "optional"
    REQUIRED = "required"


class FactorPrecision(StrEnum):
    """``gauge_ext.export.adapter_table.PRECISIONS``."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


RandomCases = Annotated[
    int,
    typer.Option(
        "--random-cases", min=0, metavar="N", help="Random inputs to compare, beside the example."
    ),
]


@explains_errors
def export(
    base: options.Base,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The ONNX file to write. An existing one is replaced only when all went well.",
            show_default=False,
        ),
    ],
    adapter: options.AdapterOption = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="merged: the adapter goes into the weights. adapters: the base alone, with inputs "
            "for adapters of any rank; gauge-ext onnx-adapter makes the files for them.",
        ),
    ] = Mode.MERGED,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --mode adapters: a layer that takes adapters, by its name or the end of it, "
            "or all-linear; may be given several times. Default: the layers of --adapter.",
            show_default=False,
        ),
    ] = None,
    adapter_form: Annotated[
        Form,
        typer.Option(
            help="With --mode adapters. optional: inputs may be left out (onnxruntime). required: "
            "they may not (onnxruntime-web, onnxruntime-node, OpenVINO).",
        ),
    ] = Form.OPTIONAL,
    adapter_precision: Annotated[
        FactorPrecision | None,
        typer.Option(
            help="With --mode adapters: how adapters are stored and fed. Default: as the base.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        options.Precision,
        typer.Option(help="How the weights are stored, quantized after the merge and measured."),
    ] = options.Precision.FP32,
    block_size: options.BlockSize = None,
    keep: options.Keep = None,
    calibration: options.Calibration = None,
    reduce_range: options.ReduceRange = True,
    min_cosine: options.MinCosine = None,
    max_loss: options.MaxLoss = None,
    architecture: Architecture = None,
    batch: options.Batch = None,
    sequence: options.Sequence = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic/--static", help="Let batch and sequence vary, or fix them as they are."
        ),
    ] = True,
    opset: Annotated[
        int, typer.Option(min=17, max=25, metavar="N", help="Version of the ONNX operators.")
    ] = 20,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--no-external-data",
            help="Write the weights to a file beside the graph. Default: when they are large.",
            show_default=False,
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate/--no-validate",
            help="Compare onnxruntime with torch before anything is put in place.",
        ),
    ] = True,
    tolerance: options.ToleranceOption = None,
    random_cases: RandomCases = 2,
    seed: options.Seed = 0,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Merge an adapter and write a validated ONNX file, or one that takes adapters as inputs.

    The adapter is merged into a copy of its base, exported under the parameters' real names, and
    run in onnxruntime against the unmerged torch model on the example, on other sizes and on random
    inputs. Only a file that agrees reaches FILE.
    """
    _check_targets(out, report_file)
    quantization = quantization_options(
        precision, block_size, keep, calibration, reduce_range, min_cosine, max_loss
    )
    chosen: str | list[str] | None = targets
    if targets is not None and [name.lower() for name in targets] == ["all-linear"]:
        chosen = "all-linear"
    model, inputs, shapes = _load(
        base, adapter, architecture, batch, sequence, seed, bare=chosen is not None
    )
    from gauge_ext.export import export_onnx
    from gauge_ext.export.validate import DisagreementError

    try:
        with working("exporting") as progress, blame("BASE", _OPTIONS):
            report = export_onnx(
                model,
                inputs,
                out,
                dynamic_shapes=shapes if dynamic else None,
                opset=opset,
                external_data=external_data,
                validate=validate,
                tolerance=_tolerance(tolerance),
                random_cases=random_cases,
                seed=seed,
                mode=mode.value,
                adapter_targets=chosen,
                precision=precision.value,  # type: ignore[arg-type]
                quantization=quantization,
                adapter_form=adapter_form.value,
                adapter_precision=None if adapter_precision is None else adapter_precision.value,
                progress=progress,
            )
    except OptionError as error:
        if isinstance(error.__cause__, DisagreementError):
            _show(error.__cause__.report, report_file, as_json)
        raise
    _show(report, report_file, as_json)


@explains_errors
def validate(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The ONNX file to check.", show_default=False),
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="BASE",
            help="The base model that it was made from: a local transformers folder, or "
            "module:factory.",
            show_default=False,
        ),
    ],
    adapter: options.AdapterOption = None,
    architecture: Architecture = None,
    batch: options.Batch = None,
    sequence: options.Sequence = None,
    tolerance: options.ToleranceOption = None,
    random_cases: RandomCases = 2,
    seed: options.Seed = 0,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Compare an ONNX file with the torch model it came from.

    The file runs in onnxruntime, the model in torch with the adapter beside its weights. Exits with
    status 1 when an output differs by more than the tolerance.
    """
    if not file.is_file():
        raise OptionError("FILE", f"no such file: {str(file)!r}.", hint="Give an .onnx file.")
    _check_targets(None, report_file)
    model, inputs, _ = _load(
        against, adapter, architecture, batch, sequence, seed, option="--against"
    )
    from gauge_ext.export import validate_onnx

    with working("validating") as progress, blame("FILE"):
        report = validate_onnx(
            file,
            model,
            inputs,
            tolerance=_tolerance(tolerance),
            random_cases=random_cases,
            seed=seed,
            progress=progress,
        )
    _show(report, report_file, as_json)
    if not report.passed:
        failed = sum(not case.passed for case in report.cases)
        raise OptionError(
            "--tolerance",
            f"{str(file)!r} disagrees with torch in {failed} of {len(report.cases)} cases.",
            hint="Export it again from this base and adapter, or allow a larger difference.",
        )


def _check_targets(out: Path | None, report: Path | None) -> None:
    for option, target in (("--out", out), ("--report", report)):
        if target is not None:
            check_target(target, option)


def _load(
    spec: str,
    adapter: Path | None,
    architecture: str | None,
    batch: int | None,
    sequence: int | None,
    seed: int,
    option: str = "BASE",
    *,
    bare: bool = False,
) -> tuple[nn.Module, Inputs, Any]:
    """Load the base with its adapter and inputs; the cheap checks come first."""
    with working("loading"), blame(option):
        check_adapter(adapter)
        base = load_base(spec, architecture=architecture)
        inputs, shapes = example_inputs(base, batch=batch, sequence=sequence, seed=seed)
        if adapter is not None or not bare:
            add_adapter(base, adapter)
    return base.model, inputs, shapes


def _tolerance(largest: float | None) -> Tolerance | None:
    from gauge_ext.export import Tolerance

    return None if largest is None else Tolerance.within(largest)


def _show(report: ExportReport | ValidationReport, file: Path | None, as_json: bool) -> None:
    """Print a report, and write it where ``--report`` says."""
    if file is not None:
        write_text(file, report.to_json() + "\n", "--report")
    if as_json:
        typer.echo(report.to_json())
    else:
        report.render(stdout())
