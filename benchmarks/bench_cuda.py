"""One layer on a GPU: ours and PEFT's, with and without torch.compile, over the frozen base layer.

Every call is timed by CUDA events, the competitors in turn, each call on another of several inputs
that together exceed the L2 cache. What is printed is the median of the ratios within a round.

    python benchmarks/bench_cuda.py [--dtype bfloat16] [--rank 16] [--dropout 0.1] [--rounds 50]
    python benchmarks/bench_cuda.py --device cpu --rounds 2     tries it out, on small layers
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Annotated

import peft
import torch
import typer
from device_timing import copies, in_turn, name, why_not
from measure import Timing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gauge_ext
from gauge_ext import _load

BASE, OURS, PEFT, COMPILED = "frozen base", "gauge_ext", "PEFT", "PEFT, torch.compile"

# (N, in, out); N is the number of tokens in the batch
SHAPES = [
    (8192, 4096, 4096),
    (8192, 2048, 2048),
    (8192, 4096, 14336),
    (2048, 4096, 4096),
    (2048, 1024, 1024),
    (64, 4096, 4096),
    (1, 4096, 4096),
]

SMALL_SHAPES = [(64, 96, 80), (1, 96, 96)]


def layers(rank: int, dropout: float, base: nn.Linear) -> dict[str, nn.Module]:
    """Return the competitors, on the same base weight, in training mode."""
    ours, theirs = nn.Sequential(copy.deepcopy(base)), nn.Sequential(copy.deepcopy(base))
    gauge_ext.attach(ours, gauge_ext.LoRAConfig(rank=rank, alpha=2 * rank, dropout=dropout))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"]
    )
    peft.inject_adapter_in_model(config, theirs)
    for module in (ours, theirs):
        module.to(base.weight.device)
        for path, parameter in module.named_parameters():
            if "lora_" in path:
                parameter.data = parameter.data.to(base.weight.dtype).normal_(std=0.02)
    found = {BASE: base, OURS: ours, PEFT: theirs}
    if base.weight.is_cuda:  # on the CPU it would take minutes to tell nothing
        found[COMPILED] = copy.deepcopy(theirs)
        found[COMPILED].compile()
    return found


def stepper(module: nn.Module, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Return forward and backward of one call; each call takes the next of the inputs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    turn = itertools.cycle(inputs)

    def step() -> object:
        x = next(turn)
        return torch.autograd.grad(module(x), [x, *parameters], grad)

    return step


def measure(
    shape: tuple[int, int, int],
    device: torch.device,
    rank: int,
    dropout: float,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, Timing]:
    """Time forward and backward of each competitor."""
    rows, width, out = shape
    base = nn.Linear(width, out, device=device, dtype=dtype).requires_grad_(False)
    count = copies(rows * width * dtype.itemsize, device)
    x = torch.randn(count, rows, width, device=device, dtype=dtype)
    inputs = [row.requires_grad_() for row in x.unbind()]
    grad = torch.randn(rows, out, device=device, dtype=dtype)
    steps = {n: stepper(m, inputs, grad) for n, m in layers(rank, dropout, base).items()}
    return in_turn(device, steps, BASE, rounds)


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    rank: int = 16,
    dropout: float = 0.1,
    rounds: int = 50,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out")] = "cuda",
) -> None:
    """Print the table."""
    console = Console()
    where = torch.device(device)
    if reason := why_not(where, _load.load().cuda):
        console.print(reason)
        raise typer.Exit(2)
    shapes = SMALL_SHAPES if where.type == "cpu" else SHAPES
    title = f"{name(where)}, {dtype}, rank {rank}, dropout {dropout}: forward and backward"
    table = Table(title=title, title_justify="left")
    for column in ("N x in -> out", "base ms", OURS, PEFT, COMPILED):
        table.add_column(column, justify="right")
    for shape in shapes:
        timings = measure(shape, where, rank, dropout, getattr(torch, dtype), rounds)
        cells = [
            f"{timings[which].ratio:.3f}" if which in timings else "-"
            for which in (OURS, PEFT, COMPILED)
        ]
        millis = f"{1e3 * timings[BASE].median:.3f}"
        table.add_row(f"{shape[0]} x {shape[1]} -> {shape[2]}", millis, *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
