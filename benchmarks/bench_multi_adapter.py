"""A different adapter for each row: ours against the base layer alone, PEFT and a gather with bmm.

Prints each ratio to the frozen ``nn.Linear``, and the goals with what was measured. ``--quick``
takes the goal's shape alone; ``--json FILE`` writes every figure.

    python benchmarks/bench_multi_adapter.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import peft
import torch
import typer
from measure import interleaved, machine
from options import JsonFile, Threads
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gauge_ext.adapters import LoRAConfig
from gauge_ext.models.many import add_adapter
from gauge_ext.models.working import adapter_rows
from gauge_ext.ops import lora_gather

BASE, OURS, MODULE, PEFT, BMM = "base", "lora_gather", "adapter_rows", "PEFT", "gather + bmm"

# (rows, adapters, in, out)
QUICK = [(64, 64, 768, 768)]
FULL = [*QUICK, (64, 8, 768, 768), (256, 16, 768, 3072), (16, 16, 2048, 2048)]
BASE_GOAL, PEFT_GOAL = 1.10, 7.0


def competitors(
    rows: int, adapters: int, inner: int, out: int, rank: int
) -> tuple[dict[str, Callable[[], object]], AbstractContextManager[object]]:
    """Return what computes the same batch, by name, and the context in which it does."""
    torch.manual_seed(0)
    base = nn.Linear(inner, out).requires_grad_(False)
    x = torch.randn(rows, inner)
    names = [f"a{row % adapters}" for row in range(rows)]
    index = torch.tensor([row % adapters for row in range(rows)])

    ours, theirs = nn.Sequential(copy.deepcopy(base)), nn.Sequential(copy.deepcopy(base))
    config = LoRAConfig(rank=rank, alpha=rank, target_modules=["0"])
    peft_config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    for i in range(adapters):
        add_adapter(ours, config, f"a{i}")
        peft.inject_adapter_in_model(peft_config, theirs, adapter_name=f"a{i}")
    ours.eval()
    theirs.eval()
    a = [torch.randn(rank, inner) / inner**0.5 for _ in range(adapters)]
    b = [torch.randn(out, rank) for _ in range(adapters)]
    scaling = [1.0] * adapters
    layer = ours[0]
    with torch.no_grad():
        for i in range(adapters):
            layer.adapter(f"a{i}").lora_A.copy_(a[i])
            layer.adapter(f"a{i}").lora_B.copy_(b[i])
            theirs[0].lora_A[f"a{i}"].weight.copy_(a[i])
            theirs[0].lora_B[f"a{i}"].weight.copy_(b[i])
    stacked_A, stacked_B = torch.stack(a), torch.stack(b)

    def bmm() -> Tensor:
        hidden = torch.bmm(stacked_A[index], x.unsqueeze(2))
        return base(x) + torch.bmm(stacked_B[index], hidden).squeeze(2)

    found = {
        BASE: lambda: base(x),
        OURS: lambda: lora_gather(x, base.weight, base.bias, a, b, scaling, index),
        MODULE: lambda: ours(x),
        PEFT: lambda: theirs[0](x, adapter_names=names),
        BMM: bmm,
    }
    return found, adapter_rows(ours, names)


def require_same(found: dict[str, Callable[[], object]]) -> None:
    """Refuse to time what does not compute the same."""
    expected = found[BMM]()
    for name in (OURS, MODULE, PEFT):
        torch.testing.assert_close(found[name](), expected, rtol=1e-3, atol=1e-3)


def main(
    quick: Annotated[bool, typer.Option(help="The goal's shape alone.")] = False,
    threads: Threads = 1,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 15,
    json_path: JsonFile = None,
) -> None:
    """Measure a batch in which each row has an adapter of its own."""
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    torch.set_num_threads(threads)
    console = Console(width=max(110, Console().width))
    facts = {**machine(), "rank": rank, "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table(title="time over the frozen base layer's", title_justify="left")
    for column in ("rows, adapters, in -> out", "base us", OURS, MODULE, BMM, PEFT):
        table.add_column(column, justify="right")
    figures = []
    for shape in QUICK if quick else FULL:
        found, rows_apart = competitors(*shape, rank)
        with torch.no_grad(), rows_apart:
            require_same(found)
            timings = interleaved(found, BASE, rounds=rounds)
            require_same(found)
        ratio = {name: timings[name].ratio for name in (OURS, MODULE, BMM, PEFT)}
        figures.append({"shape": shape, "base_us": timings[BASE].median * 1e6, "ratio": ratio})
        rows, adapters, inner, out = shape
        cells = [f"{rows}, {adapters}, {inner} -> {out}", f"{figures[-1]['base_us']:.0f}"]
        table.add_row(*cells, *(f"{value:.3f}" for value in ratio.values()))
    console.print(table)
    measured = figures[0]["ratio"]
    gain = measured[PEFT] / measured[OURS]
    goals = Table(title="goals, 64 rows, 64 adapters, 768 -> 768", title_justify="left")
    for column in ("goal", "measured", "wanted", ""):
        goals.add_column(column, justify="right")
    for what, value, wanted, met in (
        ("over the base layer", measured[OURS], f"<= {BASE_GOAL}", measured[OURS] <= BASE_GOAL),
        ("PEFT over ours", gain, f">= {PEFT_GOAL}", gain >= PEFT_GOAL),
    ):
        goals.add_row(what, f"{value:.2f}", wanted, "met" if met else "short")
    console.print(goals)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": facts, "rows": figures}, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
