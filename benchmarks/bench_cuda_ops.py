"""The other ops on a GPU: groups, an adapter for each row, merging, the optimizer step.

Each against what does the same without us, the ratio within each round; see bench_cuda.py.

    python benchmarks/bench_cuda_ops.py [--rank 16] [--rounds 30]
    python benchmarks/bench_cuda_ops.py --device cpu --rounds 2     tries it out, on small layers
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from device_timing import in_turn, name, why_not
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from gauge_ext import _load
from gauge_ext.ops import gauge_adam_step, lora_gather, lora_linear, lora_linear_group

Functions = dict[str, Callable[[], object]]


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return small random numbers."""
    return 0.02 * torch.randn(*shape, device=device, dtype=dtype)


def group(device: torch.device, width: int, rows: int, rank: int) -> tuple[str, Functions]:
    """Query, key and value, forward and backward with dropout."""
    make = partial(normal, device, torch.bfloat16)
    x = make(rows, width).requires_grad_()
    weights = [make(width, width) for _ in range(3)]
    a = [make(rank, width).requires_grad_() for _ in range(3)]
    b = [make(width, rank).requires_grad_() for _ in range(3)]
    grads = [make(rows, width) for _ in range(3)]
    seed = torch.tensor(1, device=device)
    leaves = [x, *a, *b]

    def base() -> object:
        ys = [functional.linear(x, weight) for weight in weights]
        return torch.autograd.grad(ys, x, grads)

    def separate() -> object:
        ys = [
            lora_linear(x, w, None, p, q, 2.0, 0.1, seed)
            for w, p, q in zip(weights, a, b, strict=True)
        ]
        return torch.autograd.grad(ys, leaves, grads)

    def together() -> object:
        ys = lora_linear_group(x, weights, [None] * 3, a, b, [2.0] * 3, 0.1, [seed])
        return torch.autograd.grad(ys, leaves, grads)

    title = f"q, k, v of {width}, {rows} rows, forward and backward"
    return title, {"frozen base": base, "lora_linear": separate, "lora_linear_group": together}


def gather(device: torch.device, width: int, rows: int, rank: int) -> tuple[str, Functions]:
    """As many adapters as rows, forward."""
    make = partial(normal, device, torch.bfloat16)
    x, weight = make(rows, width), make(width, width)
    a, b = [make(rank, width) for _ in range(rows)], [make(width, rank) for _ in range(rows)]
    index = torch.randperm(rows, device=device)
    scaling = [2.0] * rows
    stacked_a, stacked_b = torch.stack(a), torch.stack(b)

    def batched() -> object:
        hidden = torch.bmm(stacked_a[index], x.unsqueeze(2))
        return functional.linear(x, weight) + 2.0 * torch.bmm(stacked_b[index], hidden).squeeze(2)

    return f"{rows} rows of {width}, each its adapter, forward", {
        "frozen base": lambda: functional.linear(x, weight),
        "index and bmm": batched,
        "lora_gather": lambda: lora_gather(x, weight, None, a, b, scaling, index),
    }


def merge(device: torch.device, width: int, rank: int) -> tuple[str, Functions]:
    """One weight into another, one rounding."""
    make = partial(normal, device, torch.bfloat16)
    weight, a, b = make(width, width), make(rank, width), make(width, rank)
    out = torch.empty_like(weight)
    op = torch.ops.gauge_ext.merge_out.default

    def by_torch() -> object:
        return out.copy_(weight.float().addmm_(b.float(), a.float(), alpha=2.0))

    return f"merge into {width} x {width}", {
        "copy_": lambda: out.copy_(weight),
        "addmm_ in float32": by_torch,
        "merge_out": lambda: op([weight], [a], [b], [2.0], [False], None, 0, False, out=[out]),
    }


def optimizer(device: torch.device, width: int, pairs: int, rank: int) -> tuple[str, Functions]:
    """A step on the factors of many layers in float32."""
    make = partial(normal, device, torch.float32)
    a, b = [make(rank, width) for _ in range(pairs)], [make(width, rank) for _ in range(pairs)]
    grads_a, grads_b = [make(rank, width) for _ in a], [make(width, rank) for _ in b]
    avg_a, avg_b = ([torch.zeros_like(p) for p in part] for part in (a, b))
    sq = [[torch.ones(width, device=device) for _ in range(pairs)] for _ in range(2)]
    parameters = [nn.Parameter(p.clone()) for p in (*a, *b)]
    for parameter, grad in zip(parameters, (*grads_a, *grads_b), strict=True):
        parameter.grad = grad
    plain = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    call = (a, b, grads_a, grads_b, avg_a, avg_b, *sq, [2.0] * pairs, [0] * pairs, [10] * pairs)
    return f"step of {pairs} pairs of {width}, rank {rank}", {
        "AdamW fused": plain.step,
        "gauge_adam_step": lambda: gauge_adam_step(*call, lr=1e-6, damping=1e-3),
    }


def main(
    rank: int = 16,
    rounds: int = 30,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it out")] = "cuda",
) -> None:
    """Print the table."""
    console = Console()
    where = torch.device(device)
    if reason := why_not(where, _load.load().cuda):
        console.print(reason)
        raise typer.Exit(2)
    small = where.type == "cpu"
    width, rows = (96, 32) if small else (4096, 8192)
    cases = [
        group(where, width, rows, rank),
        gather(where, width, 8 if small else 64, rank),
        merge(where, width, rank),
        optimizer(where, width, 4 if small else 210, rank),
    ]
    table = Table(title=name(where), title_justify="left")
    for column in ("what", "by", "ms", "ratio to the first"):
        table.add_column(column)
    for title, functions in cases:
        timings = in_turn(where, functions, next(iter(functions)), rounds)
        for which, timing in timings.items():
            table.add_row(title, which, f"{1e3 * timing.median:.3f}", f"{timing.ratio:.3f}")
            title = ""
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
