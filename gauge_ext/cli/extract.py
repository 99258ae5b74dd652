"""``gauge-ext extract``: from a full fine-tune to an adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.base import folder_of, load_base
from gauge_ext.cli.console import note, print_json, stdout, working
from gauge_ext.cli.files import check_target
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.errors import AdapterMismatchError, GaugeError, TargetError

if TYPE_CHECKING:
    from torch import Tensor

    from gauge_ext.checkpoint import Extraction
    from gauge_ext.checkpoint.weights import Weights

_DEFAULT_RANK = 16
_SHOWN = 12  # lines of a table or list before "..." in a terminal's worth of text


class Dtype(StrEnum):
    """Dtypes to store factors in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


@explains_errors
def extract(
    base: options.Base,
    finetuned: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNED",
            help="The same model after full fine-tuning: a folder, or module:factory.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="The adapter's folder to write.", show_default=False
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Rank of every layer, or with --energy the largest. Default: 16, or with --energy "
            "as large as that needs.",
            show_default=False,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Give each layer the smallest rank that explains this share of its squared "
            "change, such as 0.9.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="Adapt only layers with this path or end of a path. May be repeated. Default: "
            "every linear layer but the output embeddings.",
            show_default=False,
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            "--moments",
            metavar="FILE",
            help="Weigh each layer's error by its inputs: a safetensors file, path of a layer -> "
            "second moment (in, in), as gauge_ext.checkpoint.input_moments measures them.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the factors. Default: float64 for a float64 base, else float32.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sketches.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Turn a full fine-tune into an adapter.

    Each linear layer gets the update of low rank that is nearest to its change, by randomized SVD.
    Folders are read some rows at a time, so that a large model needs little memory. Says for each
    layer which share of its change is lost, and what else changed and has no place in an adapter.
    """
    if energy is not None and not 0.0 < energy <= 1.0:
        raise OptionError("--energy", f"it must lie in (0, 1], got {energy}.")
    check_target(out / "adapter_config.json", "--out")
    with working("extracting") as progress:
        before, linear = _open(base, "BASE")
        after, _ = _open(finetuned, "FINETUNED")
        extraction = _extract(
            before,
            after,
            rank=_DEFAULT_RANK if rank is None and energy is None else rank,
            energy=energy,
            target_modules=target or "all-linear",
            linear=linear,
            covariances=_moments(moments),
            dtype=_torch_dtype(dtype),
            seed=seed,
            progress=progress,
        )
        with blame("--out"):
            extraction.save(out)
    if as_json:
        print_json({"path": str(out), **extraction.to_dict()})
    else:
        _print(extraction, out)


def _extract(before: Weights, after: Weights, **arguments: Any) -> Extraction:
    from gauge_ext.checkpoint import InputsError
    from gauge_ext.checkpoint import extract as run

    at_fault: dict[type[GaugeError], str] = {
        AdapterMismatchError: "FINETUNED",
        InputsError: "--moments",
        TargetError: "--target",
    }
    with blame("BASE", at_fault):
        return run(before, after, **arguments)


def _open(spec: str, argument: str) -> tuple[Weights, Collection[str] | None]:
    """Return the weights that BASE or FINETUNED names, and for BASE its linear layers, if known."""
    from gauge_ext.checkpoint.weights import FolderWeights, StateWeights

    with blame(argument):
        folder = folder_of(spec)
        if folder is not None:
            return FolderWeights(folder), _linear_of(folder) if argument == "BASE" else None
        model = load_base(spec).model
        return StateWeights(model.state_dict(), spec), _linear_names(model)


def _linear_of(folder: Path) -> Collection[str] | None:
    """Return the linear layers of a folder's model, built without weights; None if it can't be.

    Names and shapes alone do not tell a linear layer from a table of embeddings.
    """
    from gauge_ext.cli.folder import empty_model

    try:
        return _linear_names(empty_model(folder))
    except GaugeError as error:
        note(f"linear layers are guessed by their names: {error.message}")
        return None


def _linear_names(model: Any) -> Collection[str]:
    from gauge_ext.adapters import LoRAConfig
    from gauge_ext.models import find_targets

    return list(find_targets(model, LoRAConfig()).layers)


def _moments(file: Path | None) -> Mapping[str, Tensor] | None:
    from gauge_ext.checkpoint.weights import TensorFile

    if file is None:
        return None
    with blame("--moments"):
        return TensorFile(file)


def _torch_dtype(name: Dtype | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name.value)


def _print(extraction: Extraction, out: Path) -> None:
    from rich.table import Table

    weighted = any(layer.unexplained_output is not None for layer in extraction.layers)
    table = Table(box=None, pad_edge=False)
    table.add_column("layer")
    heads = ["shape", "rank", "|D|/|W|", "lost"] + (["lost of output"] if weighted else [])
    for head in heads:
        table.add_column(head, justify="right")
    for layer in extraction.layers:
        cells = [
            f"{layer.shape[0]} x {layer.shape[1]}",
            str(layer.rank),
            f"{layer.relative:.2g}",
            f"{layer.unexplained:.2%}",
        ]
        if weighted:
            share = layer.unexplained_output
            cells.append("-" if share is None else f"{share:.2%}")
        table.add_row(layer.name, *cells)
    console = stdout()
    console.print(table)
    console.print(
        f"{out}: {len(extraction.layers)} layers, {extraction.unexplained:.2%} of their squared "
        f"change lost\nadapter sha256: {extraction.adapter.sha256}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if extraction.unchanged:
        note(f"unchanged, and not adapted: {len(extraction.unchanged)} linear layers")
    lines = [f"{name}: {reason}" for name, reason in extraction.left_out.items()]
    for line in lines[:_SHOWN]:
        note(f"left out: {line}")
    if len(lines) > _SHOWN:
        note(f"left out: {len(lines) - _SHOWN} more tensors; --json lists them")
