"""``gauge-ext merge``: an adapter into the weights of its base model, without ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.base import add_adapter, check_adapter, folder_of, load_base
from gauge_ext.cli.console import note, print_json, stdout, working
from gauge_ext.cli.problems import OptionError, blame, explains_errors, first_line
from gauge_ext.cli.weighted import check_adapters, parse_adapters
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, WriteError

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.export import MergeReport

# What to change when a merge fails; anything else is the base's.
_OPTIONS = {
    AdapterMismatchError: "--adapter",
    AdapterFormatError: "--adapter",
    WriteError: "--out",
}


@explains_errors
def merge(
    base: options.Base,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder to write; it must be new or empty.",
            show_default=False,
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR[=WEIGHT]",
            help="The adapter's folder, in the PEFT format; needed unless BASE brings an adapter. "
            "For a folder as BASE, give it several times to add several, each with the weight "
            "after the last '=' (default 1).",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Merge an adapter into the weights of its base model.

    The result is safetensors. A transformers folder is copied with its tokenizer and config, a few
    rows at a time, so that a large model needs little memory; interrupted, the same command goes on
    where it was. From module:factory the merged state dict is saved.
    """
    chosen = parse_adapters(adapters or [])
    with blame("BASE"):
        folder = folder_of(base)
    if folder is None:
        report = _merge_model(base, _only(chosen), out)
    elif not chosen:
        raise OptionError("--adapter", "not given.", hint="Give the folder of a saved adapter.")
    else:
        from gauge_ext.export.patching.merge import merge_checkpoint

        check_adapters(chosen)
        with working("merging") as progress, blame("BASE", _OPTIONS):
            report = merge_checkpoint(folder, chosen, out, progress=progress)
    if as_json:
        print_json(_to_dict(report))
    else:
        stdout().print(
            f"{report.path}: {len(report.merged)} weights merged, {report.carried} tensors as they "
            f"were, {report.bytes_written / 2**20:,.1f} MiB\nadapter sha256: "
            f"{report.adapter_sha256}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    for file in report.skipped:
        note(f"left out: {file}, the base's weights in another format")


def _only(chosen: list[tuple[str | Path, float]]) -> Path | None:
    """The one adapter of a factory's model, taken whole."""
    if len(chosen) > 1 or any(weight != 1.0 for _, weight in chosen):
        raise OptionError(
            "--adapter",
            "several adapters, or weights, are for a folder as BASE.",
            hint="Combine them first: gauge-ext combine.",
        )
    adapter = Path(chosen[0][0]) if chosen else None
    check_adapter(adapter)
    return adapter


def _merge_model(spec: str, adapter: Path | None, out: Path) -> MergeReport:
    """Merge the model of a factory in memory, and save its state dict."""
    with working("merging"):
        from gauge_ext.checkpoint import adapter_sha256
        from gauge_ext.export import MergeReport
        from gauge_ext.export.disk.files import staged_folder
        from gauge_ext.models import lora_layers, merged_copy

        with blame("BASE", _OPTIONS), staged_folder(out) as folder:
            loaded = load_base(spec)
            add_adapter(loaded, adapter)
            model = merged_copy(loaded.model)
            merged = tuple(f"{name}.weight" for name in lora_layers(loaded.model))
            size = _save(model, folder / "model.safetensors", out)
        return MergeReport(
            path=out,
            merged=merged,
            carried=len(model.state_dict()) - len(merged),
            files=(out / "model.safetensors",),
            bytes_written=size,
            adapter_sha256=adapter_sha256(loaded.model),
        )


def _save(model: nn.Module, path: Path, out: Path) -> int:
    """Write a model's state dict, and return the file's size in bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        # Parameters that share their storage are written once; load_model knows them again.
        save_model(model, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, even where the disk is full
        raise WriteError(
            f"cannot write {out}: {first_line(error)}; nothing was left there.",
            hint="Free some space or choose another disk.",
        ) from error
    return path.stat().st_size


def _to_dict(report: MergeReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "merged": list(report.merged),
        "carried": report.carried,
        "files": [str(file) for file in report.files],
        "bytes_written": report.bytes_written,
        "adapter_sha256": report.adapter_sha256,
        "resumed": [str(file) for file in report.resumed],
        "skipped": [str(file) for file in report.skipped],
    }
