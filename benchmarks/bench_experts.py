"""Stacked experts with adapters: forward and backward of ours, PEFT's and the frozen base.

One block of Mixtral's, by each way in which transformers computes it. Prints the time over that of
the frozen base and what a step takes of memory; ``--json FILE`` writes every figure.

    python benchmarks/bench_experts.py [--quick] [--threads 1] [--json FILE]
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
from options import JsonFile, Threads
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import gauge_ext

BASE, OURS, PEFT = "frozen base", "gauge_ext", "PEFT"
WAYS = ("eager", "grouped_mm")
EXPERTS, CHOSEN, RANK = 8, 2, 8
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def models(width: int, inner: int, way: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the three models, with factors that matter."""
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    config._experts_implementation = way
    found: dict[str, nn.Module] = {}
    for name in (BASE, OURS, PEFT):
        torch.manual_seed(0)
        model = nn.Sequential(MixtralSparseMoeBlock(config))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        model = model.to(dtype).requires_grad_(False)
        if name == OURS:
            gauge_ext.attach(
                model,
                gauge_ext.LoRAConfig(rank=RANK, target_modules=[], target_parameters=PARAMETERS),
            )
        elif name == PEFT:
            fields = {"target_modules": [], "target_parameters": PARAMETERS}
            model = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, **fields), model)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.1)
        found[name] = model
    return found


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return one forward and backward, with gradients of x and the factors."""
    leaf = x.clone().requires_grad_()
    inputs = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(leaf).square().sum(), inputs)


def resident(field: str) -> int:
    """Return VmRSS, the memory resident now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_growth(do: Callable[[], object]) -> int:
    """Return how far one call raises the memory of this process, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident
    before = resident("VmRSS")
    do()
    return resident("VmHWM") - before


def main(
    quick: Annotated[bool, typer.Option(help="The smaller shape in float32 alone.")] = False,
    threads: Threads = 1,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 5,
    json_path: JsonFile = None,
) -> None:
    """Measure adapters on stacked experts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    console = Console(width=max(110, Console().width))
    facts = {**machine(), "rank": RANK, "tokens": tokens, "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    title = f"{EXPERTS} experts, {CHOSEN} for each token: over the frozen base; MiB a step takes"
    table = Table(title=title, title_justify="left")
    for column in (
        "width x inner",
        "dtype",
        "way",
        "base ms",
        OURS,
        PEFT,
        "MiB: base / ours / PEFT",
    ):
        table.add_column(column, justify="right")
    figures = []
    for width, inner in [(256, 512)] if quick else [(256, 512), (1024, 2048)]:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            for way in WAYS:
                torch.manual_seed(1)
                x = torch.randn(1, tokens, width).to(dtype)
                steps = {n: step(m, x) for n, m in models(width, inner, way, dtype).items()}
                timings = interleaved(steps, BASE, rounds=rounds)
                growth = {name: peak_growth(do) / 2**20 for name, do in steps.items()}
                ratio = {name: timings[name].ratio for name in (OURS, PEFT)}
                kind = str(dtype).removeprefix("torch.")
                milliseconds = timings[BASE].median * 1e3
                figures.append(
                    {"shape": (width, inner), "dtype": kind, "way": way, "base_ms": milliseconds}
                    | {"ratio": ratio, "mib": growth}
                )
                shown = " / ".join(f"{mib:.0f}" for mib in growth.values())
                ratios = [f"{ratio[name]:.2f}" for name in (OURS, PEFT)]
                cells = [f"{width} x {inner}", kind, way, f"{milliseconds:.1f}", *ratios, shown]
                table.add_row(*cells)
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": facts, "rows": figures}, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
