"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
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


class Precision(StrEnum):
    """``PRECISIONS`` of :mod:`gauge_ext.export.precision`, and bf16, refused with a reason."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT8_STATIC = "int8-static"
    INT4 = "int4"
    BF16 = "bf16"


BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="For int4: how many weights share a scale: 16, 32, 64, 128 or 256 (default 32).",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A weight, a node or a kind of node that stays in float32; may be given several "
        "times.",
        show_default=False,
    ),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="For int8-static: inputs by name, like those in use (.npz); for a model that "
        "generates token ids, or prompts one a line (.txt). May be given several times.",
        show_default=False,
    ),
]
ReduceRange = Annotated[
    bool,
    typer.Option(
        "--reduce-range/--full-range",
        help="For int8: weights of 7 bits, or of 8, with which sums saturate on x86 CPUs without "
        "VNNI.",
    ),
]
MinCosine = Annotated[
    float | None,
    typer.Option(
        min=-1.0,
        max=1.0,
        metavar="X",
        help="Fail if an output's cosine with the float32 graph's is lower. Default: report it.",
        show_default=False,
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Fail if an output differs from the float32 graph's by more than X times its "
        "largest entry. Default: report it.",
        show_default=False,
    ),
]
