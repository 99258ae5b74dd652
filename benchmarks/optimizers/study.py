"""Does it matter how the factors are trained? Quality, sensitivity to the gauge, and cost.

    python benchmarks/optimizers/study.py [--quick] [--tasks prose search]
        [--optimizers adamw gauge_adam ...] [--steps N] [--pretrain-steps 1200] [--json FILE]

Two tasks: a small character model of code learns prose (:mod:`prose`), and all-MiniLM-L6-v2 learns
to find names by their docstrings (:mod:`search`, needs the extra ``demo``). For each optimizer the
learning rate is chosen on validation data with one seed, from a grid that grows for as long as the
best lies at its edge; what is reported is the loss on test data that nothing was chosen on, over
fresh seeds (the draw of A and the order of the data). One of these runs is repeated with the start
in other gauges: A ten times larger or smaller (with B = 0 the same function), or of condition 100.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from prose import ProseTask
from riemannian_muon import RiemannianMuon
from search import SearchTask
from torch import Tensor, nn

from gauge_ext import LoRAConfig, attach
from gauge_ext.optim import create_optimizer, factor_pairs

RANK = 8
STEPS = {"prose": 150, "search": 40}
STARTS: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "lora_plus": (3e-4, 1e-3, 3e-3),
    "gauge_adam": (1e-3, 3e-3, 1e-2),
    "lora_rite": (1e-3, 3e-3, 1e-2),
    "scaled_gd": (0.1, 0.3, 1.0),
    "riemannian_muon": (0.01, 0.03, 0.1),
}
LONGEST_GRID = 7
GAUGES = ("A x 10", "A x 0.1", "condition 100")


class Task(Protocol):
    """What adapters learn."""

    score_name: str

    def model(self) -> nn.Module:
        """A base of one's own."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss on a batch that is drawn."""

    def evaluate(self, model: nn.Module, part: str) -> tuple[float, float]:
        """The loss and the score on "validation" or "test"."""


class Run(NamedTuple):
    """What one training came to."""

    loss: float
    score: float
    seconds_a_step: float


def change_gauge(model: nn.Module, gauge: str) -> None:
    """Start from other factors of the same update, B = 0."""
    generator = torch.Generator().manual_seed(99)
    for pair in factor_pairs(model):
        with torch.no_grad():
            if gauge == "condition 100":
                left, right = (
                    torch.linalg.qr(torch.randn(RANK, RANK, generator=generator)).Q for _ in "lr"
                )
                pair.lora_A.copy_(left * torch.logspace(-1, 1, RANK) @ right @ pair.lora_A)
            elif gauge != "as drawn":
                pair.lora_A.mul_(float(gauge.removeprefix("A x ")))


def make_optimizer(model: nn.Module, name: Any, lr: float) -> torch.optim.Optimizer:
    """One of the package's, or the study's own."""
    if name == "riemannian_muon":
        return RiemannianMuon(factor_pairs(model), lr)
    return create_optimizer(model, name, lr=lr)


def adapt(
    task: Task, name: str, lr: float, seed: int, steps: int, part: str, gauge: str = "as drawn"
) -> Run:
    """Train adapters and evaluate them on a part."""
    torch.manual_seed(1000 + seed)
    model = attach(task.model(), LoRAConfig(rank=RANK, alpha=2 * RANK))
    change_gauge(model, gauge)
    optimizer = make_optimizer(model, name, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(2000 + seed)
    seconds = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, generator)
        if not torch.isfinite(loss):
            return Run(math.inf, 0.0, math.nan)
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
        schedule.step()
    loss_, score = task.evaluate(model, part)
    if not math.isfinite(loss_):
        return Run(math.inf, 0.0, math.nan)
    return Run(loss_, score, seconds / steps)


def choose(start: tuple[float, ...], loss_at: Callable[[float], float]) -> dict[float, float]:
    """Losses by learning rate, of a grid that grows until its best lies within."""
    losses = {lr: loss_at(lr) for lr in start}
    while len(losses) < LONGEST_GRID:
        grid, best = sorted(losses), min(losses, key=losses.__getitem__)
        if best not in (grid[0], grid[-1]):
            break
        ratio = 10**0.5 if best == grid[-1] else 10**-0.5
        lr = float(f"{best * ratio:.0e}")
        losses[lr] = loss_at(lr)
    return losses


def compare(task: Task, name: str, steps: int, seeds: int, quick: bool) -> dict[str, Any]:
    """The row of an optimizer, printed and returned."""

    def on_validation(lr: float) -> float:
        return adapt(task, name, lr, 0, steps, "validation").loss

    if quick:
        losses = {lr: on_validation(lr) for lr in STARTS[name][1:]}
    else:
        losses = choose(STARTS[name], on_validation)
    lr = min(losses, key=losses.__getitem__)
    at_edge = not quick and lr in (min(losses), max(losses))
    runs = [adapt(task, name, lr, seed, steps, "test") for seed in range(1, seeds + 1)]
    others = {g: adapt(task, name, lr, 1, steps, "test", g).loss for g in GAUGES}
    in_gauges = {"as drawn": runs[0].loss, **others}
    loss, score, seconds = (list(values) for values in zip(*runs, strict=True))
    cells = "  ".join(f"{value:13.4f}" for value in in_gauges.values())
    print(
        f"{name:15s} {lr:7.0e} {statistics.fmean(loss):8.4f} +- {statistics.stdev(loss):.4f} "
        f"{statistics.fmean(score):6.4f} {1e3 * statistics.median(seconds):9.2f}  {cells}"
        f"{'  (lr at the edge)' if at_edge else ''}",
        flush=True,
    )
    return {
        "lr": lr, "at the edge of the grid": at_edge, "validation": losses, "test": loss,
        "score": score, "seconds a step": statistics.median(seconds), "in gauges": in_gauges,
    }  # fmt: skip


def main() -> None:
    """Run the study, print a table for each task, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, two seeds")
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--optimizers", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--steps", type=int, help="of the adapters, not 150 and 40 (quick: 25)")
    parser.add_argument("--pretrain-steps", type=int, help="of prose, not 1200 (quick: 120)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = 2 if options.quick else 5
    results: dict[str, Any] = {"seeds": seeds}
    for task_name in options.tasks:
        began = time.perf_counter()
        if task_name == "prose":
            task: Task = ProseTask(options.pretrain_steps or (120 if options.quick else 1200))
        else:
            task = SearchTask()
        steps = options.steps or (25 if options.quick else STEPS[task_name])
        loss, score = task.evaluate(task.model(), "test")
        print(f"{task_name}: {steps} steps of adapters, rank {RANK}; score: {task.score_name}")
        print(f"{'':15s} {'lr':>7s} {'test loss':>18s} {'score':>6s} {'ms a step':>9s}  ", end="")
        print("  ".join(f"{gauge:>13s}" for gauge in ("as drawn", *GAUGES)))
        print(f"{'base':15s} {'':7s} {loss:8.4f} {'':9s} {score:6.4f}", flush=True)
        rows = {
            name: compare(task, name, steps, seeds, options.quick) for name in options.optimizers
        }
        print(f"{time.perf_counter() - began:.0f} s\n", flush=True)
        results[task_name] = {"steps": steps, "base": loss, "base score": score, "rows": rows}
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
