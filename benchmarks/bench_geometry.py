"""Adding adapters: ours in factor form against PEFT's svd combination, error and time in one run.

Eight adapters of rank 16 on one layer, combined with random weights, measured side by side. What
is added lives in memory on both sides, in float32. The errors are distances from the weighted sum
formed in float64, over its norm; no matrix of the rank is closer than the best one of ours.

    python benchmarks/bench_geometry.py [--quick] [--size 4096] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Annotated

import peft
import torch
import typer
from measure import interleaved, machine
from options import JsonFile, Threads
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gauge_ext.geometry import LoRAPoint
from gauge_ext.merging import combine

QUICK_SIZE, FULL_SIZE = 1024, 4096


def make_points(size: int, count: int, rank: int) -> list[LoRAPoint]:
    """Return adapters whose updates have spectra that fall, as trained ones do, in any gauge."""
    generator = torch.Generator().manual_seed(0)
    scale = 1.0 / torch.arange(1, rank + 1)
    points = []
    for _ in range(count):
        b = torch.randn(size, rank, generator=generator) * scale
        a = torch.randn(rank, size, generator=generator)
        gauge = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        points.append(LoRAPoint(b, a).act(gauge))
    return points


def peft_model(points: list[LoRAPoint]) -> peft.PeftModel:
    """Return PEFT's model of one layer with the same adapters, named 0, 1, 2, ..."""
    size, rank = points[0].shape[0], points[0].rank
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(size, size, bias=False)), config, adapter_name="0"
    )
    for index in range(1, len(points)):
        model.add_adapter(str(index), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for index, point in enumerate(points):
            layer.lora_A[str(index)].weight.copy_(point.A)
            layer.lora_B[str(index)].weight.copy_(point.B)
    return model


def competitors(
    points: list[LoRAPoint], weights: list[float], rank: int
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Return what is measured; each gives the factors (B, A) of the combination."""
    model = peft_model(points)
    layer = model.base_model.model[0]
    names = [str(index) for index in range(len(points))]

    def ours(largest: int | None) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            found = combine(points, weights, rank=largest).point
            return found.B, found.A

        return run

    def theirs() -> tuple[Tensor, Tensor]:
        model.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=rank)
        factors = layer.lora_B["sum"].weight.detach(), layer.lora_A["sum"].weight.detach()
        model.delete_adapter("sum")
        return factors

    def dense() -> tuple[Tensor, Tensor]:
        total = torch.zeros(points[0].shape)
        for point, weight in zip(points, weights, strict=True):
            total.addmm_(point.B, point.A, alpha=weight)
        u, s, v = torch.svd_lowrank(total, q=rank + 8, niter=2)
        return u[:, :rank] * s[:rank], v[:, :rank].mT

    return {
        f"gauge_ext, rank {rank}": ours(rank),
        "gauge_ext, no loss": ours(None),
        f"PEFT svd, rank {rank}": theirs,
        f"dense sum, svd_lowrank, rank {rank}": dense,
    }


def measure(size: int, count: int, rank: int, rounds: int) -> list[dict[str, object]]:
    """Return a row for each competitor."""
    points = make_points(size, count, rank)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(count, generator=generator).sub(0.3).tolist()
    exact = torch.zeros(size, size, dtype=torch.float64)
    for point, weight in zip(points, weights, strict=True):
        exact.addmm_(point.B.double(), point.A.double(), alpha=weight)
    functions = competitors(points, weights, rank)
    baseline = next(iter(functions))
    timings = interleaved(functions, baseline, rounds=rounds)
    rows: list[dict[str, object]] = []
    for name, function in functions.items():
        b, a = function()
        rows.append(
            {
                "name": name,
                "rank": a.shape[0],
                "error": float((b.double() @ a.double() - exact).norm() / exact.norm()),
                "seconds": timings[name].median,
                "ratio": timings[name].ratio,
            }
        )
    return rows


def render(title: str, rows: list[dict[str, object]], console: Console) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "rank", "error", "time", "over the first"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        seconds = row["seconds"]
        assert isinstance(seconds, float)
        time = f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
        cells = (row["name"], row["rank"], f"{row['error']:.3e}", time, f"{row['ratio']:.3g}")
        table.add_row(*map(str, cells))
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option(help=f"Size {QUICK_SIZE}, about a minute.")] = False,
    size: Annotated[int | None, typer.Option(help="Rows and columns of the layer.")] = None,
    count: Annotated[int, typer.Option(help="Adapters.")] = 8,
    rank: Annotated[int, typer.Option(help="Rank of each, and of the result.")] = 16,
    threads: Threads = 1,
    rounds: Annotated[int | None, typer.Option(help="Rounds; a warm-up comes before.")] = None,
    json_path: JsonFile = None,
) -> None:
    """Measure the weighted sum of adapters against PEFT's svd combination."""
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    torch.set_num_threads(threads)
    size = size or (QUICK_SIZE if quick else FULL_SIZE)
    # PEFT decomposes the whole matrix: minutes a call at the full size.
    rounds = rounds or max(1, math.floor(5 * (QUICK_SIZE / size) ** 2))
    console = Console()
    facts = {**machine(), "dtype": "float32", "peft": peft.__version__, "rounds": rounds}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    with console.status("Measuring"):
        rows = measure(size, count, rank, rounds)
    render(f"{count} adapters of rank {rank} on {size} x {size}", rows, console)
    if json_path is not None:
        figures = {"machine": facts, "size": size, "count": count, "rows": rows}
        json_path.write_text(json.dumps(figures, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
