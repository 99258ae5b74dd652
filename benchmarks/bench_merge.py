"""Merging one weight: in place and into a new one, against one pass over it, ATen and PEFT.

Prints the time of each over that of one in-place pass, and the goals with what was measured; then
the same of a whole model, with the memory that each takes beside it. ``--quick`` takes the goal's
shape alone; ``--json FILE`` writes every figure.

    python benchmarks/bench_merge.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import peft
import torch
import typer
from measure import interleaved, machine
from options import JsonFile, Threads
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

# A model of this many layers, and what merges it.
LAYERS, WIDTH = 16, 2048
UNCHECKED = "merge_and_unload, safe=False"
WHOLE = ("pass", "merge", "merge_and_unload", UNCHECKED, "PEFT")


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


def resident(field: str) -> int:
    """Return VmRSS, the memory resident now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def whole_model(how: str, dtype: torch.dtype, rank: int) -> tuple[float, int]:
    """Merge a model and return the seconds and the bytes that it took beside the model."""
    model: nn.Module = nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS))
    )
    if how == "PEFT":
        config = peft.LoraConfig(r=rank, target_modules=[str(i) for i in range(LAYERS)])
        model = peft.get_peft_model(model, config)
        actions = model.merge_and_unload
    elif how == "pass":
        weights = [parameter.data for parameter in model.parameters()]

        def actions() -> None:
            for weight in weights:
                weight.add_(1e-9)

    else:
        gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=rank))
        how, safe = how.partition(",")[0], how != UNCHECKED
        actions = partial(getattr(gauge_ext, how), model, safe=safe)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=1e-3)
    # What former models left with the allocator would hide what this one takes.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident
    before = resident("VmRSS")
    start = time.perf_counter()
    actions()
    return time.perf_counter() - start, resident("VmHWM") - before


def measure_whole_models(rank: int, rounds: int) -> tuple[Table, list[dict[str, object]]]:
    """Measure each of :data:`WHOLE` in turn, on a new model each time."""
    table = Table(title=f"{LAYERS} layers of {WIDTH} x {WIDTH}", title_justify="left")
    for column in ("dtype", "what", "over one pass", "MiB beside the model", "MiB of weights"):
        table.add_column(column, justify="right")
    figures: list[dict[str, object]] = []
    for dtype in GOALS:
        kind = str(dtype).removeprefix("torch.")
        found: dict[str, list[tuple[float, int]]] = {how: [] for how in WHOLE}
        for _ in range(rounds):
            for how in WHOLE:
                found[how].append(whole_model(how, dtype, rank))
        for how, measured in found.items():
            ratios = [a / b for (a, _), (b, _) in zip(measured, found["pass"], strict=True)]
            ratio = statistics.median(ratios)
            beside = statistics.median(bytes_ for _, bytes_ in measured) / 2**20
            weights = LAYERS * WIDTH**2 * dtype.itemsize / 2**20
            table.add_row(kind, how, f"{ratio:.2f}", f"{beside:.0f}", f"{weights:.0f}")
            figures.append({"dtype": kind, "what": how, "ratio": ratio, "beside_mib": beside})
    return table, figures


def main(
    quick: Annotated[bool, typer.Option(help="The goal's shape alone.")] = False,
    threads: Threads = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 5,
    json_path: JsonFile = None,
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
    whole, of_models = measure_whole_models(rank, rounds)
    console.print(whole)
    if json_path is not None:
        json_path.write_text(
            json.dumps({"machine": facts, "rows": figures, "models": of_models}, indent=1)
        )
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
