"""``gauge-ext onnx-adapter``: an adapter as the file that fits a graph with adapter inputs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import stdout, working
from gauge_ext.cli.files import check_target
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.errors import WriteError

if TYPE_CHECKING:
    from gauge_ext.export import AdapterFileReport


class FileGauge(StrEnum):
    """``gauge_ext.export.adapters.file.GAUGES``."""

    TRAINED = "trained"
    BALANCED = "balanced"
    EQUAL_ENERGY = "equal_energy"
    AUTO = "auto"


@explains_errors
def onnx_adapter(
    graph: Annotated[
        Path,
        typer.Argument(
            metavar="GRAPH",
            help="The ONNX file, from gauge-ext export --mode adapters.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="The adapter's folder, in the PEFT format.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The file to write: .onnx_adapter for onnxruntime, .safetensors for runtimes that "
            "are fed the tensors.",
            show_default=False,
        ),
    ],
    gauge: Annotated[
        FileGauge,
        typer.Option(
            help="Which of the factors with the same update to store. auto measures all three for "
            "each layer and keeps the one that loses least in the graph's precision.",
        ),
    ] = FileGauge.TRAINED,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Write an adapter as the file that fits a graph.

    Names, layout, scaling and precision become those of the graph; what does not fit is an error.
    """
    check_target(out, "--out")
    if out.suffix not in {".onnx_adapter", ".safetensors"}:
        raise OptionError("--out", f"must end in .onnx_adapter or .safetensors, got {out.name!r}.")
    from gauge_ext.checkpoint import read_adapter
    from gauge_ext.export import write_onnx_adapter
    from gauge_ext.export.adapters.file import read_table

    with working("writing the adapter"):
        with blame("GRAPH"):
            read_table(graph)
        with blame("--adapter"):
            checkpoint = read_adapter(adapter)
        with blame("--adapter", {WriteError: "--out"}):
            report = write_onnx_adapter(checkpoint, graph, out, gauge=gauge.value)
    if report_file is not None:
        from gauge_ext.cli.files import write_text

        write_text(report_file, report.to_json() + "\n", "--report")
    if as_json:
        typer.echo(report.to_json())
    else:
        _print(report)


def _print(report: AdapterFileReport) -> None:
    said = report.to_dict()
    ranks = sorted(set(report.ranks.values()))
    shown = ", ".join(map(str, ranks))
    size = f"{report.bytes_written / 2**20:.2f} MiB"
    lines = [
        f"{report.path}: {len(report.ranks)} layers of rank {shown} in {report.precision}, {size}",
        f"error of the update by storing it: {report.loss:.1e} of its norm",
    ]
    if len(report.losses) > 1:
        means = ", ".join(
            f"{name} {'too large' if x is None else f'{x:.1e}'}"
            for name, x in said["loss_by_gauge"].items()
        )
        chosen = list(report.gauges.values())
        counts = ", ".join(f"{name} {chosen.count(name)}" for name in report.losses)
        lines.append(f"error by gauge: {means}; layers: {counts}")
    if report.missing:
        lines.append(f"layers of the graph left as they are: {len(report.missing)}")
    lines.append(f"adapter sha256: {report.adapter_sha256}")
    stdout().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
