"""One layer: ours, PEFT's and loralib's against the frozen base layer, forward and backward.

Prints the ratio of each to the frozen ``nn.Linear`` for every shape, and what each keeps for the
backward pass. ``--quick`` takes about a minute; ``--json FILE`` writes every figure.

    python benchmarks/bench_lora_linear.py [--quick] [--threads 1] [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import loralib
import peft
import torch
import typer
from measure import geometric_mean, interleaved, machine, saved_bytes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gauge_ext

BASE, OURS, PEFT, LORALIB = "frozen base", "gauge_ext", "PEFT", "loralib"

# (N, in, out); N is the number of tokens in the batch
QUICK = [(128, 384, 384), (1024, 384, 1536), (512, 768, 768)]
FULL = [
    *((n, i, o) for i, o in [(384, 384), (384, 1536), (768, 768)] for n in (128, 512, 2048)),
    *((n, 2048, 2048) for n in (128, 512)),
    *((n, 768, 768) for n in (1, 16)),
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

    @property
    def shape(self) -> str:
        """The sizes as the table prints them."""
        return f"{self.rows} x {self.in_features} -> {self.out_features}"


def layers(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the competitors, with the same base weight, in training mode for a step."""
    torch.manual_seed(0)
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


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Return the figures of one row."""
    found = layers(case, dtype)
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
    groups: dict[tuple[object, object, object], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["rank"], row["dropout"]), []).append(row)
    for (mode, rank, dropout), members in groups.items():
        title = f"{mode}, rank {rank}, dropout {dropout}: time over the frozen base layer's"
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
    quick: Annotated[bool, typer.Option(help="Three shapes, about a minute.")] = False,
    threads: Annotated[int, typer.Option(help="torch's threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    rank: Annotated[list[int] | None, typer.Option(help="Ranks; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds a row.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Measure one adapted layer against the frozen base layer, PEFT and loralib."""
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    torch.set_num_threads(threads)
    torch_dtype = getattr(torch, dtype)
    cases = [
        Case(mode, *shape, r, p)
        for r in rank or [8]
        for mode, p in (("forward", 0.0), ("step", 0.0), ("step", 0.1))
        for shape in (QUICK if quick else FULL)
    ]
    console = Console(width=max(110, Console().width))
    rows = [
        measure(case, torch_dtype, rounds)
        for case in track(cases, description="Measuring", console=console, transient=True)
    ]
    facts = {**machine(), "dtype": dtype, "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    render(rows, console)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
