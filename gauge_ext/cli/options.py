"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        help="The base model: a local transformers folder, or module:factory for any nn.Module, "
        "where factory() returns the model, (model, example_inputs) or "
        "(model, example_inputs, dynamic_shapes).",
        show_default=False,
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="The adapter's folder, in the PEFT format. Needed unless BASE brings an adapter.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Batch size of the example inputs made for a transformers folder (default 2).",
        show_default=False,
    ),
]
Sequence = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Length of those inputs in tokens (default 16).",
        show_default=False,
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        min=0.0,
        metavar="X",
        help="Largest difference allowed between onnxruntime and torch: X, plus X times the "
        "largest output. Default: by dtype, see the report.",
        show_default=False,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Seed of the made-up inputs.", show_default=True)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Also write the report as JSON here.", show_default=False
    ),
]
