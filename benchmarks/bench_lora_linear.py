"""One layer: ours, PEFT's and loralib's against the frozen base layer, forward and backward.

Prints the ratio of each to the frozen ``nn.Linear`` for every shape, what each keeps for the
backward pass, and the goals that these figures are measured by. ``--quick`` takes about a minute;
``--json FILE`` writes every figure.

    python benchmarks/bench_lora_linear.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import loralib
import peft
import torch
import typer
from goals import Goal, render_goals
from measure import geometric_mean, interleaved, machine, saved_bytes
from options import JsonFile, Threads
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gauge_ext

BASE, OURS, PEFT, LORALIB = "frozen base", "gauge_ext", "PEFT", "loralib"

Shape = tuple[int, int, int]  # (N, in, out); N is the number of tokens in the batch

QUICK: list[Shape] = [(128, 384, 384), (1024, 384, 1536), (512, 768, 768)]
FULL: list[Shape] = [
    *((n, i, o) for i, o in [(384, 384), (384, 1536), (768, 768)] for n in (128, 512, 2048)),
    (512, 1536, 384),
]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    mode: str  # "forward" without gradients, or "step": forward and backward
    rows: int
    in_features: int
    out_features: int
    rank: int
    dropout: float
    dtype: str = "float32"

    @property
    def shape(self) -> str:
        """The sizes as the table prints them."""
        return f"{self.rows} x {self.in_features} -> {self.out_features}"


def plan(quick: bool) -> dict[str, list[Case]]:
    """Return the cases of each goal, by its number."""

    def steps(shapes: list[Shape], ranks: tuple[int, ...], dropout: float) -> list[Case]:
        return [Case("step", *shape, rank, dropout) for rank in ranks for shape in shapes]

    def forwards(shapes: list[Shape], dtype: str = "float32") -> list[Case]:
        return [Case("forward", *shape, 8, 0.0, dtype) for shape in shapes]

    shapes = QUICK if quick else FULL
    few = QUICK[:1] if quick else [(128, 384, 384), (512, 768, 768), (512, 384, 1536)]
    wide = [(128, 2048, 2048)] if quick else [(128, 2048, 2048), (512, 2048, 2048)]
    tall = [(1024, 384, 384)] if quick else [(1024, 384, 384), (2048, 384, 384), (2048, 768, 768)]
    small = [1, 16] if quick else [1, 2, 4, 8, 16, 32]
    rows = [(n, 768, d) for d in (768, 2048) for n in small]
    half = [(128, 384, 384)] if quick else [(128, 384, 384), (512, 384, 384), (128, 768, 768)]
    return {
        "1": steps(shapes, (8,), 0.0),
        "2": steps(shapes, (8,), 0.1),
        "3a": steps(few, (16, 32), 0.0),
        "3b": steps(few, (16, 32), 0.1),
        "4a": steps(few, (64,), 0.0),
        "4b": steps(few, (64,), 0.1),
        "5a": steps(wide, (8,), 0.0),
        "5b": steps(wide, (8,), 0.1),
        "6": forwards(tall),
        "7a": forwards(rows),
        "7b": forwards([(n, 768, 768) for n in small], "bfloat16"),
        "8": [Case("step", *shape, 8, 0.1, "bfloat16") for shape in half],
    }


# What the mean over a goal's cases should be, and, where one is set, the worst of them.
LIMITS = {
    "1": ("step, r 8, d < 2048, p = 0", 1.06, None),
    "2": ("step, r 8, d < 2048, p = .1", 1.07, None),
    "3a": ("step, r 16 and 32, p = 0", 1.14, None),
    "3b": ("step, r 16 and 32, p = .1", 1.16, None),
    "4a": ("step, r 64, p = 0", 1.32, None),
    "4b": ("step, r 64, p = .1", 1.34, None),
    "5a": ("step, r 8, d 2048, p = 0", 1.02, None),
    "5b": ("step, r 8, d 2048, p = .1", 1.03, None),
    "6": ("forward, N >= 2 d", 1.03, None),
    "7a": ("forward, N 1 to 32, d >= 768", 0.80, 1.0),
    "7b": ("forward, N 1 to 32, bfloat16", 0.60, None),
    "8": ("step, bfloat16, N >= 128", 0.65, None),
}


def goals_of(rows: dict[str, list[dict[str, object]]]) -> list[Goal]:
    """Return the goals that ratios to the frozen base layer are set for."""
    found = []
    for number, (what, mean, worst) in LIMITS.items():
        ratios = [row["ratio"][OURS] for row in rows[number]]
        found.append(Goal(f"{number}  {what}: mean", geometric_mean(ratios), mean))
        if worst is not None:
            found.append(Goal(f"{number}  {what}: worst", max(ratios), worst))
    return found


def call_goals(rounds: int) -> list[Goal]:
    """Return what a call costs beyond its arithmetic: 16 x 16, where there is hardly any."""
    case = Case("forward", 16, 16, 16, 8, 0.0)
    ours = layers(case)[OURS]
    x, weight, bias = torch.randn(16, 16), ours.weight, ours.bias
    factors = (ours.lora_A, ours.lora_B, ours.scaling)
    op = gauge_ext.ops.lora_linear
    functions: dict[str, Callable[[], object]] = {
        "F.linear": lambda: nn.functional.linear(x, weight, bias),
        "op": lambda: op(x, weight, bias, *factors),
        "module": lambda: ours(x),
    }
    with torch.no_grad():
        found = interleaved(functions, "F.linear", rounds=10 * rounds)
    base = min(found["F.linear"].seconds)
    extra = {name: (min(timing.seconds) - base) * 1e6 for name, timing in found.items()}
    return [
        Goal("13  op over F.linear, no gradients", extra["op"], 1.0, unit=" us"),
        Goal("13  module over F.linear, no gradients", extra["module"], 3.0, unit=" us"),
    ]


def import_goal(repeats: int) -> Goal:
    """Return what importing the package costs after torch, each time in a fresh process.

    Compiled before, as pip compiles what it installs: the first run is not counted.
    """
    program = (
        "import time, torch; start = time.perf_counter(); import gauge_ext; gauge_ext.attach; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", program]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds = [
        float(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            ).stdout
        )
        for _ in range(repeats + 1)
    ][1:]
    return Goal("18  import gauge_ext after torch", statistics.median(seconds), 0.15, unit=" s")


def layers(case: Case) -> dict[str, nn.Module]:
    """Return the competitors, with the same base weight, in training mode for a step."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    base = nn.Linear(case.in_features, case.out_features, dtype=dtype).requires_grad_(False)
    alpha = 2 * case.rank

    ours = nn.Sequential(copy.deepcopy(base))
    config = gauge_ext.LoRAConfig(rank=case.rank, alpha=alpha, dropout=case.dropout)
    gauge_ext.attach(ours, config)

    theirs = nn.Sequential(copy.deepcopy(base))
    peft_config = peft.LoraConfig(
        r=case.rank, lora_alpha=alpha, lora_dropout=case.dropout, target_modules=["0"]
    )
    peft.inject_adapter_in_model(peft_config, theirs)

    loras = loralib.Linear(
        case.in_features,
        case.out_features,
        r=case.rank,
        lora_alpha=alpha,
        lora_dropout=case.dropout,
        merge_weights=False,
        dtype=dtype,
    )
    loras.load_state_dict(base.state_dict(), strict=False)
    loras.bias.requires_grad_(False)

    found = {BASE: base, OURS: ours[0], PEFT: theirs[0], LORALIB: loras}
    for module in found.values():
        module.train(case.mode == "step")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    return found


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Return the figures of one row."""
    found, dtype = layers(case), getattr(torch, case.dtype)
    x = torch.randn(case.rows, case.in_features, dtype=dtype)
    grad = torch.randn(case.rows, case.out_features, dtype=dtype)

    def forward(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return module(x)

        return run

    def step(module: nn.Module) -> Callable[[], object]:
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *(p for p in module.parameters() if p.requires_grad)]

        def run() -> object:
            return torch.autograd.grad(module(leaf), inputs, grad)

        return run

    runner = forward if case.mode == "forward" else step
    timings = interleaved({n: runner(m) for n, m in found.items()}, BASE, rounds=rounds)
    row: dict[str, object] = {
        **asdict(case),
        "base_us": timings[BASE].median * 1e6,
        "ratio": {name: timings[name].ratio for name in (OURS, PEFT, LORALIB)},
    }
    if case.mode == "step":
        leaf = x.clone().requires_grad_()
        row["saved_bytes"] = {name: saved_bytes(module, leaf) for name, module in found.items()}
    return row


def render(rows: list[dict[str, object]], console: Console) -> None:
    """Print a table for each mode and dropout, with geometric means and the worst case."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        key = (row["mode"], row["rank"], row["dropout"], row["dtype"])
        groups.setdefault(key, []).append(row)
    for (mode, rank, dropout, dtype), members in groups.items():
        title = f"{mode}, rank {rank}, dropout {dropout}, {dtype}: over the frozen base layer"
        table = Table(title=title, title_justify="left")
        for column in ("N x in -> out", "base us", OURS, PEFT, LORALIB):
            table.add_column(column, justify="right")
        saved = "saved_bytes" in members[0]
        if saved:
            table.add_column("KiB saved: base / ours / PEFT / loralib", justify="right")
        for row in members:
            ratio, shape = row["ratio"], f"{row['rows']} x {row['in_features']} -> "
            cells = [f"{shape}{row['out_features']}", f"{row['base_us']:.0f}"]
            cells += [f"{ratio[name]:.3f}" for name in (OURS, PEFT, LORALIB)]
            if saved:
                kept = row["saved_bytes"]
                names = (BASE, OURS, PEFT, LORALIB)
                cells.append(" / ".join(f"{kept[name] / 1024:.0f}" for name in names))
            table.add_row(*cells)
        table.add_section()
        for label, reduce in (("geometric mean", geometric_mean), ("worst", max)):
            figures = [
                f"{reduce([row['ratio'][name] for row in members]):.3f}"
                for name in (OURS, PEFT, LORALIB)
            ]
            table.add_row(label, "", *figures, *([""] if saved else []))
        console.print(table)


def main(
    quick: Annotated[bool, typer.Option(help="Fewer shapes and rounds, about a minute.")] = False,
    threads: Threads = 1,
    rounds: Annotated[int | None, typer.Option(help="Rounds a row.")] = None,
    json_path: JsonFile = None,
) -> None:
    """Measure one adapted layer against the frozen base layer, PEFT and loralib."""
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    torch.set_num_threads(threads)
    rounds = rounds or (7 if quick else 15)
    console = Console(width=max(110, Console().width))
    cases = plan(quick)
    todo = [(number, case) for number, members in cases.items() for case in members]
    rows: dict[str, list[dict[str, object]]] = {number: [] for number in cases}
    for number, case in track(todo, "Measuring", console=console, transient=True):
        rows[number].append(measure(case, rounds))
    goals = [*goals_of(rows), *call_goals(rounds), import_goal(3 if quick else 7)]
    facts = {**machine(), "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    every = [row for members in rows.values() for row in members]
    render(every, console)
    render_goals(goals, console)
    if json_path is not None:
        figures = {"machine": facts, "rows": every, "goals": [goal.as_dict() for goal in goals]}
        json_path.write_text(json.dumps(figures, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
