"""An adapter into the block-quantized weights of an ONNX file, beside a plain copy of the file.

As in bench_export.py each way runs in a process of its own, from files to files, and what is
measured is that process: CPU seconds (user and system), wall seconds, peak memory. The rounds go
through all ways in turn; the median of each is shown, and that of the ratios round by round.
The file holds 32 layers of 4096 x 4096 in 4-bit blocks of 32, 256 MiB of codes, with scales in
float32 and zero points, as onnxruntime's own quantizer writes them.

    python benchmarks/bench_blocks.py [--quick] [--json FILE] [--folder DIR] [--rounds 5]
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_export import GOAL_CPU, GOAL_MEMORY, NAMES
from measure import machine
from options import Folder, JsonFile, Rounds
from processes import Cost, run, run_code
from rich.console import Console
from rich.table import Table

WIDTH, BLOCK, LAYERS, QUICK_LAYERS = 4096, 32, 32, 2
RANKS = (8, 16)
TASKS = ("numpy_alone", "copy_onnx", "patch")


def write_files(folder: Path, rank: int, layers: int) -> None:
    """Write the quantized file and an adapter for all of its layers."""
    import torch

    import gauge_ext
    from gauge_ext.checkpoint import LoRAPair, write_adapter

    (folder / "onnx").mkdir(parents=True)
    _write_model(folder / "onnx" / "model.onnx", layers)
    torch.manual_seed(0)
    pairs = {
        f"layers.{i}": LoRAPair(0.02 * torch.randn(rank, WIDTH), 0.02 * torch.randn(WIDTH, rank))
        for i in range(layers)
    }
    config = gauge_ext.LoRAConfig(rank=rank, alpha=2 * rank, target_modules=list(pairs))
    write_adapter(config, pairs, folder / "adapter")


def _write_model(path: Path, layers: int) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    blocks = WIDTH // BLOCK
    nodes, stored = [], []
    for i in range(layers):
        # Codes of normal numbers, blocks of which span about four deviations: std 0.02.
        codes = rng.normal(7.5, 3.5, (WIDTH, blocks, BLOCK)).round().clip(0, 15).astype("u1")
        scales = rng.uniform(0.005, 0.006, WIDTH * blocks).astype("f4")
        parts = {
            f"layers.{i}.weight_Q4": codes[..., 0::2] | codes[..., 1::2] << 4,
            f"layers.{i}.weight_scales": scales,
            f"layers.{i}.weight_zero_points": np.full(WIDTH * blocks // 2, 0x88, "u1"),
        }
        stored += [numpy_helper.from_array(array, name) for name, array in parts.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [f"x{i}", *parts],
                [f"x{i + 1}"],
                domain="com.microsoft",
                K=WIDTH,
                N=WIDTH,
                bits=4,
                block_size=BLOCK,
            )
        )
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
        for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    location = f"{path.name}.data"
    onnx.save(model, str(path), save_as_external_data=True, location=location)


def prepare(folder: Path, rank: int, layers: int) -> None:
    """Write the files in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import bench_blocks; "
        "bench_blocks.write_files(Path(sys.argv[1]), *map(int, sys.argv[2:]))"
    )
    run_code(code, folder, rank, layers)


def show(rank: int, size: int, costs: dict[str, list[Cost]]) -> dict[str, bool]:
    """Print a table and the goals; return these."""
    console = Console()
    title = f"rank {rank}: {size / 2**20:,.0f} MiB in 4-bit blocks of {BLOCK}"
    table = Table(title=title, title_justify="left")
    for heading in ("way", "CPU s", "wall s", "peak MiB", "x CPU of copy"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    ratios = {
        task: statistics.median(
            cost.cpu / floor.cpu
            for cost, floor in zip(costs[task], costs["copy_onnx"], strict=True)
        )
        for task in TASKS[1:]
    }
    for task, ratio in ratios.items():
        cpu, wall = (
            statistics.median(getattr(cost, name) for cost in costs[task])
            for name in ("cpu", "wall")
        )
        peak = max(cost.peak for cost in costs[task])
        table.add_row(NAMES[task], f"{cpu:.2f}", f"{wall:.2f}", f"{peak:,.0f}", f"{ratio:.1f}")
    console.print(table)
    extra = max(cost.peak for cost in costs["patch"]) - min(c.peak for c in costs["numpy_alone"])
    goals = {
        f"{extra:.0f} MiB above numpy alone, at most {GOAL_MEMORY:.0f}": extra <= GOAL_MEMORY,
        f"{ratios['patch']:.1f} x the CPU time of a plain copy, at most {GOAL_CPU:.0f}": (
            ratios["patch"] <= GOAL_CPU
        ),
    }
    for text, met in goals.items():
        console.print(f"goal {'met  ' if met else 'SHORT'}  {text}", highlight=False)
    return goals


def main(
    quick: Annotated[bool, typer.Option(help="Two layers, one round.")] = False,
    rounds: Rounds = 5,
    folder: Folder = None,
    json_file: JsonFile = None,
) -> None:
    """Measure both ways for each rank and print a table."""
    figures: dict[str, Any] = {"machine": machine()}
    for rank in RANKS:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            place = Path(name)
            prepare(place, rank, QUICK_LAYERS if quick else LAYERS)
            size = sum(file.stat().st_size for file in (place / "onnx").iterdir())
            costs: dict[str, list[Cost]] = {task: [] for task in TASKS}
            for _ in range(1 if quick else rounds):
                for task in TASKS:
                    costs[task].append(run(task, place, ""))
                    shutil.rmtree(place / f"out_{task}", ignore_errors=True)
            goals = show(rank, size, costs)
            figures[f"rank {rank}"] = {
                "bytes": size,
                "costs": {task: list(map(asdict, found)) for task, found in costs.items()},
                "goals": goals,
            }
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
