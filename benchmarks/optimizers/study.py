"""Does it matter how the factors are trained? Quality, sensitivity to the gauge, and cost.

    python benchmarks/optimizers/study.py [--quick] [--steps 150] [--pretrain-steps 1200]
        [--json FILE]

A small character-level transformer learns the code of Python's standard library; its adapters then
learn the prose of Python's own documentation. For each optimizer the learning rate is chosen on
validation text with one seed; what is reported is the loss on test text that nothing was chosen
on, over fresh seeds (the draw of A and the order of the data). The same runs are repeated with the
start in other gauges: A ten times larger or smaller (with B = 0 the same function), or of
condition 100.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import LoRAConfig, attach
from gauge_ext.optim import create_optimizer, factor_pairs

CONTEXT, WIDTH, BATCH, RANK = 64, 96, 16, 8
GRIDS: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora_plus": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "gauge_adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora_rite": (1e-3, 3e-3, 1e-2, 3e-2),
    "scaled_gd": (0.03, 0.1, 0.3, 1.0, 3.0),
}
GAUGES = ("as drawn", "A x 10", "A x 0.1", "condition 100")


class Block(nn.Module):
    """A causal transformer block of four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of x's shape."""
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharLM(nn.Module):
    """A character-level language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(batch, length, 128)``."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read_texts() -> tuple[Tensor, Tensor]:
    """The code that the base learns, and the prose that the adapters learn, as tokens."""
    library = Path(os.__file__).parent
    code = "".join(p.read_text("utf-8", "ignore") for p in sorted(library.glob("*.py"))[:80])
    import pydoc_data.topics

    prose = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    return tuple(
        torch.tensor([min(byte, 127) for byte in text.encode()], dtype=torch.long)
        for text in (code, prose)
    )  # type: ignore[return-value]


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences and what follows each of their characters."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of a batch, in nats."""
    return F.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """The loss on sequences that lie next to one another, the same for every model."""
    count = min(48, (len(text) - 1) // (4 * CONTEXT))
    starts = torch.arange(count * 4) * ((len(text) - CONTEXT - 1) // (count * 4))
    rows = torch.stack([text[s : s + CONTEXT + 1] for s in starts])
    return float(loss_of(model, (rows[:, :-1], rows[:, 1:])))


def pretrain(text: Tensor, steps: int) -> CharLM:
    """The base model."""
    torch.manual_seed(0)
    model = CharLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(text, generator)).backward()
        optimizer.step()
        schedule.step()
    return model


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


def adapt(
    base: CharLM, text: Tensor, name: Any, lr: float, seed: int, steps: int, gauge: str
) -> tuple[nn.Module, float]:
    """Train adapters; returns the model and the seconds that optimizer steps took, each."""
    torch.manual_seed(1000 + seed)
    model = attach(copy.deepcopy(base), LoRAConfig(rank=RANK, alpha=2 * RANK))
    change_gauge(model, gauge)
    optimizer = create_optimizer(model, name, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(2000 + seed)
    seconds = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(text, generator)).backward()
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
        schedule.step()
    return model, seconds / steps


def main() -> None:
    """Run the study, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one minute: fewer steps, two seeds")
    parser.add_argument("--steps", type=int, help="of the adapters, in place of 150 (quick: 25)")
    parser.add_argument("--pretrain-steps", type=int, help="of the base, not 1200 (quick: 120)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pretrain_steps, steps, seeds = (120, 25, 2) if options.quick else (1200, 150, 5)
    steps = options.steps or steps
    pretrain_steps = options.pretrain_steps or pretrain_steps
    code, prose = read_texts()
    train, check, test = (
        prose[: len(prose) * 6 // 10],
        prose[len(prose) * 6 // 10 : len(prose) * 8 // 10],
        prose[len(prose) * 8 // 10 :],
    )
    base = pretrain(code, pretrain_steps)
    print(f"base on test text: {evaluate(base, test):.4f}; {steps} steps of adapters, rank {RANK}")
    results: dict[str, Any] = {"steps": steps, "seeds": seeds, "base": evaluate(base, test)}
    print(f"{'':12s} {'lr':>7s} {'test loss':>17s} {'ms a step':>9s}  " + "  ".join(GAUGES))
    for name, grid in GRIDS.items():
        scores = {}
        for lr in grid[1:3] if options.quick else grid:
            model, _ = adapt(base, train, name, lr, 0, steps, "as drawn")
            loss = evaluate(model, check)
            scores[lr] = loss if math.isfinite(loss) else math.inf
        lr = min(scores, key=scores.__getitem__)
        losses, costs = [], []
        for seed in range(1, seeds + 1):
            model, cost = adapt(base, train, name, lr, seed, steps, "as drawn")
            losses.append(evaluate(model, test))
            costs.append(cost)
        in_gauges = {
            g: evaluate(adapt(base, train, name, lr, 1, steps, g)[0], test) for g in GAUGES
        }
        at_edge = lr in (grid[0], grid[-1]) and not options.quick
        spread = statistics.stdev(losses)
        results[name] = {
            "lr": lr, "at the edge of the grid": at_edge, "validation": scores, "test": losses,
            "seconds a step": statistics.median(costs), "in gauges": in_gauges,
        }  # fmt: skip
        row = "  ".join(f"{value:.4f}" for value in in_gauges.values())
        mean = statistics.fmean(losses)
        print(
            f"{name:12s} {lr:7.0e} {mean:8.4f} +- {spread:.4f} "
            f"{1e3 * statistics.median(costs):9.2f}  {row}{'  (lr at the edge)' if at_edge else ''}"
        )
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
