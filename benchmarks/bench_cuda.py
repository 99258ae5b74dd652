"""One layer on a GPU: ours and PEFT's, with and without torch.compile, over the frozen base layer.

Every call is timed by CUDA events, the competitors in turn, each call on another of several inputs
that together exceed the L2 cache. What is printed is the median of the ratios within a round.

    python benchmarks/bench_cuda.py [--dtype bfloat16] [--rank 16] [--dropout 0.1] [--rounds 50]
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Annotated

import peft
import torch
import typer
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

# More than the L2 cache of any GPU so far
ROTATED_BYTES = 256 * 2**20


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
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(base.weight.dtype).normal_(std=0.02)
    compiled = copy.deepcopy(theirs)
    compiled.compile()
    return {BASE: base, OURS: ours, PEFT: theirs, COMPILED: compiled}


def stepper(module: nn.Module, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Return forward and backward of one call; each call takes the next of the inputs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    turn = itertools.cycle(inputs)

    def step() -> object:
        x = next(turn)
        return torch.autograd.grad(module(x), [x, *parameters], grad)

    return step


def timed(function: Callable[[], object]) -> float:
    """Return the milliseconds between two events around one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(
    shape: tuple[int, int, int], rank: int, dropout: float, dtype: torch.dtype, rounds: int
) -> tuple[float, dict[str, float]]:
    """Return the base's milliseconds and the ratio of each competitor."""
    rows, width, out = shape
    base = nn.Linear(width, out, device="cuda", dtype=dtype).requires_grad_(False)
    copies = max(2, -(-ROTATED_BYTES // (rows * width * dtype.itemsize)))
    x = torch.randn(min(copies, 64), rows, width, device="cuda", dtype=dtype)
    inputs = [row.requires_grad_() for row in x.unbind()]
    grad = torch.randn(rows, out, device="cuda", dtype=dtype)
    steps = {n: stepper(m, inputs, grad) for n, m in layers(rank, dropout, base).items()}
    for step in steps.values():
        for _ in range(5):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(timed(steps[name]))
    ratios = {
        name: statistics.median(t / b for t, b in zip(times, seconds[BASE], strict=True))
        for name, times in seconds.items()
    }
    return statistics.median(seconds[BASE]), ratios


def main(
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    rank: int = 16,
    dropout: float = 0.1,
    rounds: int = 50,
) -> None:
    """Print the table."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("There is no GPU here; bench_lora_linear.py measures the CPU.")
        raise typer.Exit(2)
    if not _load.load().cuda:
        console.print("This build has no CUDA kernels: GAUGE_EXT_CUDA=1 pip install says why.")
        raise typer.Exit(2)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    title = f"{device}, {dtype}, rank {rank}, dropout {dropout}: forward and backward"
    table = Table(title=title, title_justify="left")
    for column in ("N x in -> out", "base ms", OURS, PEFT, COMPILED):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        base, ratios = measure(shape, rank, dropout, getattr(torch, dtype), rounds)
        cells = [f"{ratios[name]:.3f}" for name in (OURS, PEFT, COMPILED)]
        table.add_row(f"{shape[0]} x {shape[1]} -> {shape[2]}", f"{base:.3f}", *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
