"""Why a goal of bench_lora_linear.py is short: where the time over the frozen base layer goes.

For each case of a goal that isn't met, what ours adds to the base layer, in microseconds, and what
it is made of, each part measured by itself:

- floor: the adapter's own products at the rate of the base's products at that shape, or, where that
  takes longer, the bytes that they cannot do without at the rate of a copy of x;
- drawing: of the dropout mask, and multiplying x with it;
- dispatch: what a call adds where there is hardly any arithmetic;
- rest: what is left: products that run slower than the base's, memory, caches.

    python benchmarks/profile_lora_linear.py [--quick] [--goal 1 --goal 3a] [--threads 1]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from bench_lora_linear import BASE, LIMITS, OURS, Case, layers, plan
from measure import geometric_mean, interleaved, machine
from options import Threads
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gauge_ext

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and bytes of one call."""

    products: float
    bytes: float


def base_products(case: Case) -> float:
    """Return the multiply-adds of the base layer: W once, and again for the gradient of x."""
    once = case.rows * case.in_features * case.out_features
    return once * (2 if case.mode == "step" else 1)


def floor_of(case: Case) -> Cost:
    """Return what the adapter cannot do without, beyond the base layer's own work.

    A step: x A^T and its product with B^T, then the gradients of that product, of both factors and
    of x. It reads x and the gradient of y once more, reads x again and writes and adds to y and to
    the gradient of x before the base's products are added onto them.

    A forward alone: the same two products, or s B A and a pass over W, whichever is less.
    """
    n, i, o, r = case.rows, case.in_features, case.out_features, case.rank
    factors = r * (i + o)
    if case.mode == "step":
        return Cost(3 * n * factors, FLOAT * (n * (4 * i + 3 * o) + 6 * factors))
    apart = Cost(n * factors, FLOAT * (n * (i + 2 * o) + factors))
    formed = Cost(r * i * o, FLOAT * (3 * i * o + factors))
    return min(apart, formed, key=lambda cost: cost.products)


def copy_rate(case: Case, rounds: int) -> float:
    """Return the bytes a second, read and written, of a copy of x, in a cache where it fits."""
    source = torch.randn(case.rows, case.in_features)
    target = torch.empty_like(source)
    found = interleaved({"copy": lambda: target.copy_(source)}, "copy", rounds=rounds)
    return 2 * source.nbytes / found["copy"].median


def drawing(case: Case, rounds: int) -> float:
    """Return the seconds that drawing and applying the mask take: once a pass, twice a step.

    It is the difference that dropout makes to a layer with one output, which does little else.
    """
    if case.dropout == 0.0:
        return 0.0
    op = torch.ops.gauge_ext.lora_linear_forward.default
    x, weight = torch.randn(case.rows, case.in_features), torch.randn(1, case.in_features)
    lora_A, lora_B = torch.randn(1, case.in_features), torch.randn(1, 1)
    seed = torch.tensor(0)

    def call(p: float) -> Callable[[], object]:
        return lambda: op(x, weight, None, lora_A, lora_B, 1.0, p, seed)

    found = interleaved({"off": call(0.0), "on": call(case.dropout)}, "off", rounds=rounds)
    once = found["on"].median - found["off"].median
    return once * (2 if case.mode == "step" else 1)


def runner(case: Case, module: nn.Module) -> Callable[[], object]:
    """Return one call of a layer: forward without gradients, or forward and backward."""
    x = torch.randn(case.rows, case.in_features, dtype=getattr(torch, case.dtype))
    if case.mode == "forward":

        def run() -> Tensor:
            with torch.no_grad():
                return module(x)

        return run
    grad = torch.randn(case.rows, case.out_features, dtype=x.dtype)
    leaf = x.requires_grad_()
    inputs = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(leaf), inputs, grad)


def timed(case: Case, rounds: int) -> tuple[float, float]:
    """Return the seconds of the base layer, and ours over it, taken round by round."""
    found = layers(case)
    pair = {name: runner(case, found[name]) for name in (BASE, OURS)}
    timings = interleaved(pair, BASE, rounds=rounds)
    return timings[BASE].median, timings[OURS].ratio


def dispatch(mode: str, dropout: float, rounds: int) -> float:
    """Return the seconds that our layer adds to the base where there is hardly any arithmetic."""
    base, ratio = timed(Case(mode, 1, 16, 16, 1, dropout), 4 * rounds)
    return base * (ratio - 1)


def render_calls(rounds: int, console: Console) -> None:
    """Print what a call without gradients costs, by how it is made: goal 13."""
    case = Case("forward", 16, 16, 16, 8, 0.0)
    ours = layers(case)[OURS]
    x, weight, bias = torch.randn(16, 16), ours.weight, ours.bias
    factors = (ours.lora_A, ours.lora_B, ours.scaling)
    linear = torch.ops.aten.linear.default
    by_torch_ops = torch.ops.gauge_ext.lora_linear.default
    op = gauge_ext.ops.lora_linear
    functions: dict[str, Callable[[], object]] = {
        "F.linear": lambda: nn.functional.linear(x, weight, bias),
        "aten.linear, called by torch.ops": lambda: linear(x, weight, bias),
        "gauge_ext.lora_linear, called by torch.ops": lambda: by_torch_ops(
            x, weight, bias, *factors
        ),
        "gauge_ext.ops.lora_linear": lambda: op(x, weight, bias, *factors),
        "our module": lambda: ours(x),
    }
    with torch.no_grad():
        found = interleaved(functions, "F.linear", rounds=10 * rounds)
    table = Table(title="16 x 16 -> 16, no gradients", title_justify="left")
    for column in ("", "us", "over F.linear"):
        table.add_column(column, justify="right" if column else "left")
    base = min(found["F.linear"].seconds)
    for name, timing in found.items():
        best = min(timing.seconds)
        table.add_row(name, f"{best * 1e6:.2f}", f"{(best - base) * 1e6:+.2f}")
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option(help="The shapes of --quick there.")] = False,
    goal: Annotated[list[str] | None, typer.Option(help="Those alone: 1, 3a, ...")] = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 15,
    all_goals: Annotated[bool, typer.Option("--all", help="Those that are met too.")] = False,
) -> None:
    """Say of each goal that is short where the time goes."""
    torch.set_num_threads(threads)
    console = Console(width=max(110, Console().width))
    cases = {n: members for n, members in plan(quick).items() if members[0].dtype == "float32"}
    unknown = set(goal or ()) - set(cases)
    if unknown:
        raise typer.BadParameter(
            f"must be of {', '.join(cases)}, got {', '.join(sorted(unknown))}", param_hint="--goal"
        )
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
    fixed = {
        (mode, dropout): dispatch(mode, dropout, rounds)
        for mode, dropout in (("step", 0.0), ("step", 0.1), ("forward", 0.0))
    }
    for number in track(goal or list(cases), "Measuring", console=console, transient=True):
        what, limit, _ = LIMITS[number]
        rows, ratios, floors = [], [], []
        for case in cases[number]:
            base, ratio = timed(case, rounds)
            added = base * (ratio - 1)
            cost, speed, rate = floor_of(case), base_products(case) / base, copy_rate(case, rounds)
            parts = {
                "floor": max(cost.products / speed, cost.bytes / rate),
                "drawing": drawing(case, rounds),
                "dispatch": fixed[case.mode, case.dropout],
            }
            rest = added - sum(parts.values())
            ratios.append(ratio)
            floors.append(1 + parts["floor"] / base)
            bound = "products" if cost.products / speed >= cost.bytes / rate else "bytes"
            rows.append(
                [
                    f"{case.shape}, r {case.rank}",
                    f"{base * 1e6:.0f}",
                    f"{2 * speed / 1e9:.0f}",
                    f"{rate / 1e9:.0f}",
                    f"{ratio:.3f}",
                    f"{floors[-1]:.3f} ({bound})",
                    f"{added * 1e6:+.0f}",
                    *(f"{seconds * 1e6:.0f}" for seconds in (*parts.values(), rest)),
                ]
            )
        measured = geometric_mean(ratios)
        if measured <= limit and not all_goals and not goal:
            continue
        title = f"{number}  {what}: {measured:.3f}, goal {limit:.2f}"
        title += f"; the floor alone is {geometric_mean(floors):.3f}"
        table = Table(title=title, title_justify="left")
        names = ("N x in -> out", "base us", "GFLOP/s", "GB/s", "ratio", "floor's", "added us")
        for column in (*names, "floor", "drawing", "dispatch", "rest"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if goal is None:
        render_calls(rounds, console)


if __name__ == "__main__":
    typer.run(main)
