"""``gauge-ext quantize``: an ONNX file in fewer bits, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import stdout, working
from gauge_ext.cli.files import check_target, write_text
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.cli.sets import read_arrays, read_calibration
from gauge_ext.errors import ConfigError, ValidationError, WriteError

if TYPE_CHECKING:
    from gauge_ext.export import QuantizationOptions
    from gauge_ext.export.precision.quantize_methods import Precision


@explains_errors
def quantize(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The float32 ONNX file.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The file to write.", show_default=False),
    ],
    precision: Annotated[
        options.Precision,
        typer.Option(
            help="fp16: norms and sums stay float32. int8: weights per channel, activations when "
            "it runs. int8-static: ranges from --calibration. int4: linear layers, in blocks.",
        ),
    ] = options.Precision.INT8,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="NPZ",
            help="Inputs by name on which the outputs are compared with the float32 file's; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
    block_size: options.BlockSize = None,
    keep: options.Keep = None,
    calibration: options.Calibration = None,
    reduce_range: options.ReduceRange = True,
    min_cosine: options.MinCosine = None,
    max_loss: options.MaxLoss = None,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Store an ONNX file's weights in fewer bits, and measure the loss.

    Every weight is read back and compared; the outputs are compared on --inputs. The loss is
    reported; --min-cosine and --max-loss make it a condition.
    """
    check_target(out, "--out")
    if report_file is not None:
        check_target(report_file, "--report")
    if not file.is_file():
        raise OptionError("FILE", f"no such file: {str(file)!r}.", hint="Give an .onnx file.")
    if precision is options.Precision.FP32:
        raise OptionError("--precision", "fp32 is what the file is in.", hint="Choose another.")
    stored, chosen = quantization_options(
        precision, block_size, keep, calibration, reduce_range, min_cosine, max_loss
    )
    measured = [read_arrays(path, "--inputs") for path in inputs or ()]
    if chosen is not None and chosen.tolerance is not None and not measured:
        raise OptionError("--inputs", "not given, so no output can be judged.")
    from gauge_ext.export import quantize_onnx

    blamed: dict[type[Any], str] = {WriteError: "--out"}
    blamed[ValidationError] = "--max-loss" if min_cosine is None else "--min-cosine"
    with working(f"to {precision.value}"), blame("FILE", blamed):
        report = quantize_onnx(file, out, stored, inputs=measured, options=chosen)
    if report_file is not None:
        write_text(report_file, report.to_json() + "\n", "--report")
    if as_json:
        typer.echo(report.to_json())
    else:
        report.render(stdout())


_IN_FEWER_BITS = tuple(one for one in options.Precision if one is not options.Precision.FP32)
# The options that are not about all of them
_ONLY_FOR = {
    "--block-size": (options.Precision.INT4,),
    "--calibration": (options.Precision.INT8_STATIC,),
    "--full-range": (options.Precision.INT8, options.Precision.INT8_STATIC),
}


def quantization_options(
    precision: options.Precision,
    block_size: int | None,
    keep: list[str] | None,
    calibration: list[Path] | None,
    reduce_range: bool,
    min_cosine: float | None,
    max_loss: float | None,
    base: str | None = None,
) -> tuple[Precision, QuantizationOptions | None]:
    """Collect the options about fewer bits.

    Args:
        precision: As its option says; so are the following.
        block_size: For int4.
        keep: What stays in float32.
        calibration: For int8-static: files.
        reduce_range: For int8.
        min_cosine: A bar.
        max_loss: Another.
        base: BASE of a model that generates, which may be calibrated on text; else None.

    Returns:
        How the weights are stored, and the options; None for fp32.

    Raises:
        OptionError: They do not go together, or a file is no set of inputs.
    """
    given = {
        "--block-size": block_size,
        "--keep": keep,
        "--calibration": calibration,
        "--full-range": None if reduce_range else True,
        "--min-cosine": min_cosine,
        "--max-loss": max_loss,
    }
    for option, value in given.items():
        # Without a word, a user would believe that it had an effect.
        about = _ONLY_FOR.get(option, _IN_FEWER_BITS)
        if value is not None and precision not in about:
            names = " or ".join(one.value for one in about)
            raise OptionError(option, f"it is for --precision {names}, which is {precision.value}.")
    if precision is options.Precision.FP32:
        return "fp32", None
    from gauge_ext.export.precision.quantize_methods import QuantizationOptions, require_precision
    from gauge_ext.export.tolerance import Tolerance

    tolerance = None
    if min_cosine is not None or max_loss is not None:
        tolerance = Tolerance(
            relative=1e300 if max_loss is None else max_loss,
            cosine=-1.0 if min_cosine is None else min_cosine,
            top1=0.0,
        )
    chosen = QuantizationOptions(
        calibration=read_calibration(calibration or (), base),
        block_size=32 if block_size is None else block_size,
        keep=tuple(keep or ()),
        reduce_range=reduce_range,
        tolerance=tolerance,
    )
    try:
        return require_precision(precision.value, chosen), chosen
    except ConfigError as error:
        option = "--block-size" if "block_size" in error.message else "--precision"
        if "int8-static" in error.message:
            option = "--calibration"
        raise OptionError(option, error.message, hint=error.hint) from error
