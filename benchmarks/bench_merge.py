"""Merging one weight: in place and into a new one, against one pass over it, ATen and PEFT.

Prints the time of each over that of one in-place pass, and the goals with what was measured.
``--quick`` takes the goal's shape alone; ``--json FILE`` writes every figure.

    python benchmarks/bench_merge.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import peft
import torch
import typer
from measure import interleaved, machine
from rich.console import Console
from rich.table import Table
from torch import nn

import gauge_ext
from gauge_ext.ops import draw_seed, merge_, merge_into

PASS, OURS, INTO, CHANCE, REPORT = "one pass", "merge_", "merge_into", "by chance", "with fidelity"
MODEL, ATEN, PEFT = "gauge_ext.merge", "W += s B A", "PEFT"

QUICK = [(4096, 4096)]
FULL = [*QUICK, (1024, 1024), (11008, 4096)]
# PEFT's time over ours, in place
GOALS = {torch.float32: 6.4, torch.bfloat16: 25.0}


def competitors(
    out: int, inner: int, rank: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return what merges an adapter of this size, by name."""
    torch.manual_seed(0)
    weight, target = (torch.randn(out, inner).to(dtype) for _ in range(2))
    passed = weight.clone()
    a, b = torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank) * 1e-3
    scaling = 1e-6  # the weights stay what they are, however often it is added

    theirs = nn.Sequential(nn.Linear(inner, out, bias=False, dtype=dtype))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    # As PEFT loads an adapter onto half-precision weights, its factors are float32.
    peft.inject_adapter_in_model(config, theirs)
    layer = theirs[0]

    ours = nn.Sequential(nn.Linear(inner, out, bias=False, dtype=dtype))
    gauge_ext.attach(ours, gauge_ext.LoRAConfig(rank=rank, alpha=rank, target_modules=["0"]))

    def with_peft() -> None:
        layer.merge()
        layer.merged_adapters.clear()  # the next round merges again

    def model() -> None:
        gauge_ext.unmerge(gauge_ext.merge(ours))

    found = {
        PASS: lambda: passed.add_(1e-9),
        OURS: lambda: merge_(weight, a, b, scaling),
        REPORT: lambda: merge_(weight, a, b, scaling, fidelity=True),
        INTO: lambda: merge_into(target, weight, a, b, scaling),
        MODEL: model,
        ATEN: lambda: weight.add_((b.to(dtype) @ a.to(dtype)) * scaling),
        PEFT: with_peft,
    }
    if dtype == torch.bfloat16:
        found[CHANCE] = lambda: merge_(weight, a, b, scaling, seed=draw_seed())
    return found


def main(
    quick: Annotated[bool, typer.Option(help="The goal's shape alone.")] = False,
    threads: Annotated[int, typer.Option(help="torch's threads.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure merging against one in-place pass over the weight, ATen and PEFT."""
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    torch.set_num_threads(threads)
    console = Console(width=max(130, Console().width))
    facts = {**machine(), "rank": rank, "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table(title="time over one in-place pass", title_justify="left")
    names = [OURS, REPORT, INTO, CHANCE, MODEL, ATEN, PEFT]
    for column in ("out x in", "dtype", "pass ms", *names):
        table.add_column(column, justify="right")
    goals = Table(title="goals, PEFT over merge_, 4096 x 4096", title_justify="left")
    for column in ("dtype", "measured", "wanted", ""):
        goals.add_column(column, justify="right")
    figures = []
    for out, inner in QUICK if quick else FULL:
        for dtype, goal in GOALS.items():
            timings = interleaved(competitors(out, inner, rank, dtype), PASS, rounds=rounds)
            ratio = {name: timings[name].ratio for name in names if name in timings}
            kind = str(dtype).removeprefix("torch.")
            milliseconds = timings[PASS].median * 1e3
            figures.append(
                {"shape": (out, inner), "dtype": kind, "pass_ms": milliseconds, "ratio": ratio}
            )
            shown = [f"{ratio[name]:.2f}" if name in ratio else "" for name in names]
            table.add_row(f"{out} x {inner}", kind, f"{milliseconds:.2f}", *shown)
            if (out, inner) == QUICK[0]:
                gain = ratio[PEFT] / ratio[OURS]
                met = "met" if gain >= goal else "short"
                goals.add_row(kind, f"{gain:.1f}", f">= {goal}", met)
    console.print(table)
    console.print(goals)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": facts, "rows": figures}, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
