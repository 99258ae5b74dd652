"""DoRA, embeddings and convolutions: forward and backward of ours and PEFT's, p = 0 and p = 0.1.

Of DoRA the ratio to the plain LoRA layer of the same library is printed too, which is what the goal
is set for. ``--quick`` takes about a minute; ``--json FILE`` writes every figure.

    python benchmarks/bench_variants.py [--quick] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

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

BASE, OURS, PEFT = "frozen base", "gauge_ext", "PEFT"
RANK = 8


@dataclass(frozen=True)
class Case:
    """One row: a layer, what it reads, and the dropout of its branch."""

    kind: str
    sizes: tuple[int, ...]
    dropout: float

    def layer(self) -> nn.Module:
        """Return the base layer."""
        if self.kind == "embedding":  # (tokens, vocabulary, dim)
            return nn.Embedding(*self.sizes[1:])
        if self.kind == "conv1d":  # (batch, channels in and out, length, kernel)
            _, width, _, kernel = self.sizes
            return nn.Conv1d(width, width, kernel, padding="same")
        if self.kind == "conv2d":
            _, width, _, kernel = self.sizes
            return nn.Conv2d(width, width, kernel, padding="same")
        return nn.Linear(*self.sizes[1:])  # (N, in, out)

    def x(self) -> Tensor:
        """Return what the layer reads."""
        if self.kind == "embedding":
            return torch.randint(self.sizes[1], (self.sizes[0],))
        if self.kind.startswith("conv"):
            batch, width, length, _ = self.sizes
            return torch.randn(batch, width, *[length] * int(self.kind[4]))
        return torch.randn(self.sizes[:2])


def plan(quick: bool) -> list[Case]:
    """Return the cases."""
    linear = [(128, 384, 384), (1024, 384, 1536), (512, 768, 768)]
    tables, one, two = [(1024, 30522, 384)], [(8, 256, 256, 3)], [(4, 64, 32, 3)]
    if not quick:
        linear += [(512, 384, 384), (512, 1536, 384), (2048, 384, 384), (512, 2048, 2048)]
        tables += [(1024, 32000, 2048), (8192, 30522, 768)]
        one += [(4, 512, 512, 3)]
        two += [(4, 256, 16, 3), (8, 128, 32, 1)]
    kinds = {"DoRA": linear, "embedding": tables, "conv1d": one, "conv2d": two}
    return [
        Case(kind, sizes, dropout)
        for kind, members in kinds.items()
        for sizes in members
        for dropout in (0.0, 0.1)
        if kind != "embedding" or dropout == 0.0
    ]


def adapted(case: Case, use_dora: bool) -> dict[str, nn.Module]:
    """Return our layer and PEFT's around the same base, in training, with factors that matter."""
    torch.manual_seed(0)
    base = nn.Sequential(case.layer())
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    numbers = {"target_modules": ["0"], "use_dora": use_dora}
    config = gauge_ext.LoRAConfig(rank=RANK, alpha=2 * RANK, dropout=case.dropout, **numbers)
    gauge_ext.attach(ours, config)
    peft_config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=case.dropout, **numbers)
    peft.inject_adapter_in_model(peft_config, theirs)
    found = {BASE: base.requires_grad_(False), OURS: ours, PEFT: theirs}
    for model in found.values():
        model.train()
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                nn.init.normal_(parameter, std=0.1)
    return {name: model[0] for name, model in found.items()}


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Return the figures of one row: ratios to the base and, of DoRA, to the plain LoRA."""
    plain = adapted(case, use_dora=False)
    competitors = dict(plain)
    if case.kind == "DoRA":
        competitors |= {f"{n} DoRA": m for n, m in adapted(case, True).items() if n != BASE}
    x = case.x()
    floating = x.is_floating_point()
    grad = torch.randn_like(plain[BASE](x))

    def step(module: nn.Module) -> Callable[[], object]:
        leaf = x.clone().requires_grad_(floating)
        inputs = [p for p in module.parameters() if p.requires_grad]
        inputs += [leaf] if floating else []
        if not inputs:  # a frozen table has no backward
            return lambda: module(leaf)
        return lambda: torch.autograd.grad(module(leaf), inputs, grad)

    timings = interleaved({n: step(m) for n, m in competitors.items()}, OURS, rounds=rounds)
    ratio = {name: timing.ratio for name, timing in timings.items()}
    leaf = x.clone().requires_grad_(floating)
    return {
        **asdict(case),
        "us": timings[OURS].median * 1e6,
        "to_our_lora": ratio,
        "saved_bytes": {name: saved_bytes(module, leaf) for name, module in competitors.items()},
    }


def render(rows: list[dict[str, object]], console: Console) -> None:
    """Print one table for each kind of layer."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for kind in kinds:
        members = [row for row in rows if row["kind"] == kind]
        names = [name for name in members[0]["to_our_lora"] if name != OURS]
        title = f"{kind}, forward and backward, rank {RANK}: over our plain LoRA layer"
        table = Table(title=title, title_justify="left")
        for column in ("sizes", "p", "ours us", *names, "KiB saved: base / ours / PEFT / DoRAs"):
            table.add_column(column, justify="right")
        for row in members:
            sizes = " x ".join(map(str, row["sizes"]))
            ratios = [f"{row['to_our_lora'][name]:.3f}" for name in names]
            saved = " / ".join(f"{count / 1024:.0f}" for count in row["saved_bytes"].values())
            table.add_row(sizes, f"{row['dropout']}", f"{row['us']:.0f}", *ratios, saved)
        console.print(table)


def goals_of(rows: list[dict[str, object]]) -> list[Goal]:
    """Return the goals: DoRA over LoRA, and no layer slower than PEFT's."""
    found = []
    for dropout in (0.0, 0.1):
        name = f"17  DoRA step over our LoRA step, p = {dropout}"
        dora = [r["to_our_lora"] for r in rows if r["kind"] == "DoRA" and r["dropout"] == dropout]
        over = [ratio[f"{OURS} DoRA"] for ratio in dora]
        found += [Goal(f"{name}: mean", geometric_mean(over), 1.25)]
        found += [Goal(f"{name}: worst", max(over), 1.25)]
        faster = [ratio[f"{PEFT} DoRA"] / ratio[f"{OURS} DoRA"] for ratio in dora]
        found.append(Goal(f"PEFT's DoRA over ours, p = {dropout}", geometric_mean(faster), 1, True))
    for kind in ("embedding", "conv1d", "conv2d"):
        ratios = [row["to_our_lora"][PEFT] for row in rows if row["kind"] == kind]
        found.append(Goal(f"PEFT's {kind} over ours", geometric_mean(ratios), 1.0, at_least=True))
    return found


def main(
    quick: Annotated[bool, typer.Option(help="Fewer shapes and rounds, about a minute.")] = False,
    threads: Threads = 1,
    rounds: Annotated[int | None, typer.Option(help="Rounds a row.")] = None,
    json_path: JsonFile = None,
) -> None:
    """Measure DoRA, embeddings and convolutions."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(threads)
    rounds = rounds or (7 if quick else 15)
    console = Console(width=max(130, Console().width))
    cases = plan(quick)
    rows = [measure(c, rounds) for c in track(cases, "Measuring", console=console, transient=True)]
    goals = goals_of(rows)
    facts = {**machine(), "peft": peft.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    render(rows, console)
    render_goals(goals, console)
    if json_path is not None:
        figures = {"machine": facts, "rows": rows, "goals": [goal.as_dict() for goal in goals]}
        json_path.write_text(json.dumps(figures, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
