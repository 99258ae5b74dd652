"""``gauge-ext patch``: an adapter into an ONNX model that exists already, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gauge_ext.cli import options
from gauge_ext.cli.console import note, print_json, stdout, working
from gauge_ext.cli.files import check_target
from gauge_ext.cli.problems import blame, explains_errors
from gauge_ext.cli.weighted import Adapters, check_adapters, parse_adapters
from gauge_ext.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    NonFiniteError,
    WriteError,
)

if TYPE_CHECKING:
    from gauge_ext.export import PatchReport

_OPTIONS = {
    AdapterMismatchError: "--adapter",
    AdapterFormatError: "--adapter",
    NonFiniteError: "--adapter",
    WriteError: "--out",
}
# Rounding that takes this much of an update deserves a word.
_MUCH_LOST = 0.5


@explains_errors
def patch(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx file of the base, made by any exporter; its weights may be inside or "
            "beside it.",
            show_default=False,
        ),
    ],
    adapters: Adapters,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The .onnx file to write; one that lies there is replaced at the very end.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="The folder (safetensors) of the model that MODEL was exported from: weights are "
            "then told by their values too, and every one is checked.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Before it is put in place, run the result in onnxruntime against MODEL with the "
            "sums fed to it. Loads the model twice.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Add an adapter to the weights of an ONNX model.

    Each weight is found by the metadata of its exporter, its name, its values or its shape, in
    either layout, in floating point or in 4-bit or 8-bit blocks (MatMulNBits); the rest of the file
    is copied as it is. It needs onnx and numpy, no torch, and little memory for any size.
    """
    check_target(out, "--out")
    chosen = parse_adapters(adapters)
    check_adapters(chosen)
    with working("reading") as progress, blame("MODEL", _OPTIONS):
        from gauge_ext.export.patching.patch import patch_onnx

        report = patch_onnx(model, chosen, out, base_weights=base, verify=verify, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    for weight in report.weights:
        if weight.loss is not None and weight.loss.of_update > _MUCH_LOST:
            note(
                f"{weight.tensor}: rounding to blocks lost {weight.loss.of_update:.0%} of the "
                "update; patch the unquantized model and quantize the result"
            )


def _show(report: PatchReport) -> None:
    from rich import box
    from rich.table import Table

    console = stdout()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("module", "initializer", "layout", "found by", "lost"):
        table.add_column(heading, overflow="fold")
    for weight in report.weights:
        lost = "" if weight.loss is None else f"{weight.loss.of_update:.1%} of the update"
        cells = (weight.module, weight.tensor, weight.layout, weight.found_by, lost)
        table.add_row(*map(escape, cells))
    console.print(table)
    console.print(
        f"{report.path}: {len(report.weights)} weights patched, "
        f"{report.bytes_written / 2**20:,.1f} MiB\nadapter sha256: {report.adapter_sha256}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if report.difference is not None:
        console.print(
            f"verified in onnxruntime: {report.difference:.1e} of the largest output",
            highlight=False,
            markup=False,
        )
