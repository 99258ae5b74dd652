"""``gauge-ext export``: the road to ONNX."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.adapted import (
    Architecture,
    RandomCases,
    check_targets,
    load_adapted,
    show,
    tolerance_of,
)
from gauge_ext.cli.base import example_inputs
from gauge_ext.cli.console import working
from gauge_ext.cli.generating import export_folder, kind_of
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.cli.quantize import quantization_options
from gauge_ext.errors import TargetError, ValidationError, WriteError

# What to change when an export fails; anything else is the model's.
_OPTIONS = {WriteError: "--out", ValidationError: "--tolerance", TargetError: "--targets"}


class Mode(StrEnum):
    """What becomes of the adapter."""

    MERGED = "merged"
    ADAPTERS = "adapters"


class Form(StrEnum):
    """``gauge_ext.export.adapters.table.FORMS``."""

    OPTIONAL = "optional"
    REQUIRED = "required"


class FactorPrecision(StrEnum):
    """``gauge_ext.export.adapters.table.PRECISIONS``."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class Task(StrEnum):
    """What the graphs are for."""

    AUTO = "auto"
    PLAIN = "plain"
    TEXT_GENERATION = "text-generation"
    SEQ2SEQ = "seq2seq"
    SPEECH = "speech"


@explains_errors
def export(
    base: options.Base,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="PATH",
            help="The ONNX file to write; an existing one is replaced only when all went well. For "
            "a model that generates, the folder to write; it must be new or empty.",
            show_default=False,
        ),
    ],
    adapter: options.AdapterOption = None,
    task: Annotated[
        Task,
        typer.Option(
            help="plain: one forward pass, one file. text-generation: a graph with a key-value "
            "cache, with config and tokenizer in a folder. seq2seq, speech: an encoder and a "
            "decoder with a cache. auto: what the model is made for if PATH does not end in .onnx, "
            "else plain.",
        ),
    ] = Task.AUTO,
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
        typer.Option(
            help="How the weights are stored: quantized after the merge, or beside the inputs for "
            "adapters; what that loses is measured."
        ),
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
    inputs. Only a file that agrees reaches PATH.
    """
    single = task is Task.PLAIN or (task is Task.AUTO and out.suffix == ".onnx")
    _check_targets(out, report_file)
    stored, quantization = quantization_options(
        *(precision, block_size, keep, calibration, reduce_range, min_cosine, max_loss),
        base=None if single else base,
    )
    chosen: str | list[str] | None = targets
    if targets is not None and [name.lower() for name in targets] == ["all-linear"]:
        chosen = "all-linear"
    loaded = load_adapted(base, adapter, architecture, bare=chosen is not None)
    if not single and (task is not Task.AUTO or kind_of(loaded.model) is not None):
        only_for_single = {
            "--batch": batch is not None,
            "--sequence": sequence is not None,
            "--static": not dynamic,
        }
        for option, given in only_for_single.items():
            if given:
                raise OptionError(
                    option,
                    "it is for single graphs, and this export is a model that generates.",
                    hint="Give --task plain, or leave it out.",
                )
        export_folder(
            loaded,
            out,
            "seq2seq" if task in {Task.SEQ2SEQ, Task.SPEECH} else task.value,
            report_file,
            as_json,
            mode=mode.value,
            adapter_targets=chosen,
            adapter_form=adapter_form.value,
            adapter_precision=None if adapter_precision is None else adapter_precision.value,
            precision=stored,
            quantization=quantization,
            opset=opset,
            external_data=external_data,
            validate=validate,
            tolerance=tolerance_of(tolerance),
            seed=seed,
        )
        return
    check_targets(out=out)
    with blame("BASE"):
        inputs, shapes = example_inputs(loaded, batch=batch, sequence=sequence, seed=seed)
    from gauge_ext.export import export_onnx
    from gauge_ext.export.validate import DisagreementError

    try:
        with working("exporting") as progress, blame("BASE", _OPTIONS):
            report = export_onnx(
                loaded.model,
                inputs,
                out,
                dynamic_shapes=shapes if dynamic else None,
                opset=opset,
                external_data=external_data,
                validate=validate,
                tolerance=tolerance_of(tolerance),
                random_cases=random_cases,
                seed=seed,
                mode=mode.value,
                adapter_targets=chosen,
                precision=stored,
                quantization=quantization,
                adapter_form=adapter_form.value,
                adapter_precision=None if adapter_precision is None else adapter_precision.value,
                progress=progress,
            )
    except OptionError as error:
        if isinstance(error.__cause__, DisagreementError):
            show(error.__cause__.report, report_file, as_json)
        raise
    show(report, report_file, as_json)


def _check_targets(out: Path, report: Path | None) -> None:
    """Refuse files that can't be written; what else is written may be a folder."""
    check_targets(report=report, out=out if out.suffix == ".onnx" else None)
