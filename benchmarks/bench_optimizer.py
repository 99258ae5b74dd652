"""The step of each optimizer on the adapters of a model of 210 layers, side by side.

    python benchmarks/bench_optimizer.py [--quick] [--ranks 8 16 64] [--rounds 15]
        [--json FILE]

Ratios are to ``torch.optim.AdamW(fused=True)`` on the same factors, taken round by round. The
shapes are those of a 135M-parameter language model: 30 blocks of seven linear layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, machine
from torch import nn

from gauge_ext.optim import FactorPair, GaugeAdam, LoRARITE, ScaledGD

BLOCK = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
GOALS = {8: 0.8, 16: 1.1, 64: 1.8}


def factors(rank: int, shapes: tuple[tuple[int, int], ...]) -> list[FactorPair]:
    """Random factors with gradients."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for m, n in shapes:
        a = nn.Parameter(torch.randn(rank, n, generator=generator) / n**0.5)
        b = nn.Parameter(0.01 * torch.randn(m, rank, generator=generator))
        for factor in (a, b):
            factor.grad = 1e-3 * torch.randn(factor.shape, generator=generator)
        pairs.append(FactorPair(a, b, 2.0))
    return pairs


def flat(pairs: list[FactorPair]) -> list[Any]:
    """All factors in one list."""
    return [factor for pair in pairs for factor in pair[:2]]


def steps(rank: int) -> dict[str, Callable[[], object]]:
    """The step of each optimizer, on factors of its own."""
    shapes = BLOCK * 30
    return {
        "AdamW fused": torch.optim.AdamW(flat(factors(rank, shapes)), lr=1e-6, fused=True).step,
        "AdamW foreach": torch.optim.AdamW(flat(factors(rank, shapes)), lr=1e-6, foreach=True).step,
        "ScaledGD": ScaledGD(factors(rank, shapes), lr=1e-6).step,
        "ScaledGD, momentum": ScaledGD(factors(rank, shapes), lr=1e-6, momentum=0.9).step,
        "GaugeAdam": GaugeAdam(factors(rank, shapes), lr=1e-6).step,
        "LoRARITE": LoRARITE(factors(rank, shapes), lr=1e-6).step,
    }


def peft_ratio(rank: int, rounds: int) -> float:
    """PEFT's Riemannian AdamW against AdamW on the factors of three blocks."""
    import peft
    from peft.optimizers import create_riemannian_optimizer

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in BLOCK * 3)

    names = [f"layers.{i}" for i in range(len(BLOCK) * 3)]
    config = peft.LoraConfig(r=rank, target_modules=names)
    model = peft.get_peft_model(Base(), config)  # type: ignore[arg-type] # PEFT asks for a PreTrainedModel
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-6)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = 1e-3 * torch.randn_like(p)
    plain = torch.optim.AdamW(flat(factors(rank, BLOCK * 3)), lr=1e-6, fused=True)
    timing = interleaved({"adamw": plain.step, "peft": optimizer.step}, "adamw", rounds=rounds)
    return timing["peft"].ratio


def measure_rank(rank: int, rounds: int) -> dict[str, Any]:
    """Measure one rank, print its table, and return what was printed."""
    print(f"\nrank {rank}, 210 pairs; ms a step (median, least), ratio (median of rounds)")
    timings = interleaved(steps(rank), "AdamW fused", rounds=rounds)
    for name, timing in timings.items():
        least = 1e3 * min(timing.seconds)
        print(f"  {name:24s} {1e3 * timing.median:8.1f} {least:8.1f} {timing.ratio:7.2f}")
    ratios: dict[str, Any] = {name: timing.ratio for name, timing in timings.items()}
    try:
        ratios["PEFT Riemannian AdamW"] = peft_ratio(rank, rounds)
        text = f"{ratios['PEFT Riemannian AdamW']:.2f} of AdamW fused, on 21 pairs"
    except ImportError as error:
        text = f"not run: {error}"
    print(f"  PEFT create_riemannian_optimizer: {text}")
    for name in ("ScaledGD", "GaugeAdam", "LoRARITE"):
        ratio, goal = timings[name].ratio, GOALS.get(rank)
        pairs = zip(timings[name].seconds, timings["AdamW foreach"].seconds, strict=True)
        against = statistics.median(own / foreach for own, foreach in pairs)
        if goal is not None:
            verdict = "met" if ratio <= goal else "short"
            print(f"  {name}: {ratio:.2f} of fused, goal {goal}: {verdict}; ", end="")
        verdict = "met" if against <= 2 else "short"
        print(f"{against:.2f} of foreach, goal 2: {verdict}")
    return {"rank": rank, "goal": GOALS.get(rank), "ratios": ratios}


def main() -> None:
    """Print one table a rank, and how far the goals are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three rounds: less than a minute")
    parser.add_argument("--json", type=Path, help="write the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    rounds = 3 if options.quick else options.rounds
    rows = [measure_rank(rank, rounds) for rank in options.ranks]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
