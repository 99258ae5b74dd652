"""An adapter into files: patching ONNX models and merging checkpoints, against the other ways.

Each way runs in a process of its own, from files to files; what is measured is that process as the
system saw it: CPU seconds (user and system), wall seconds, peak memory. The rounds go through all
ways in turn, and the least of each is shown. Results are compared with each other, number by
number. The plain copy is the floor; memory is counted from an interpreter with numpy.

    python benchmarks/bench_export.py [--quick] [--json FILE] [--folder DIR] [--rounds 3]

The full run takes a Llama of 135M parameters and 1.5 GiB of linear layers, about 10 GiB of disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import machine
from options import Folder, JsonFile, Rounds
from processes import Cost, run, run_code
from rich.console import Console
from rich.table import Table

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL, QUICK = ("llama30", "wide24"), ("llama1", "wide2")
# The floor, ours, and the other ways.
GROUPS = {
    "ONNX file": ("copy_onnx", "patch", "onnx_numpy", "peft_onnx"),
    "checkpoint": ("copy_folder", "merge", "peft_save"),
}
NAMES = {
    "copy_onnx": "plain copy",
    "copy_folder": "plain copy",
    "patch": "gauge-ext patch",
    "merge": "gauge-ext merge",
    "onnx_numpy": "onnx.load, numpy, onnx.save",
    "peft_onnx": "PEFT merge, torch.onnx",
    "peft_save": "PEFT merge, save",
}
GOAL_MEMORY, GOAL_CPU = 64.0, 3.0


def prepare(kind: str, folder: Path) -> None:
    """Write the base as a checkpoint and as ONNX, and an adapter, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import bench_export; "
        "bench_export.write_files(sys.argv[1], Path(sys.argv[2]))"
    )
    run_code(code, kind, folder)


def write_files(kind: str, folder: Path) -> None:
    """Write the files that all ways start from."""
    import export_tasks
    import torch
    from safetensors.torch import save_model

    import gauge_ext
    from gauge_ext.checkpoint import LoRAPair, write_adapter

    model, inputs = export_tasks.build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    (folder / "base").mkdir(parents=True)
    save_model(model, str(folder / "base" / "model.safetensors"), metadata={"format": "pt"})
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    pairs = {
        name: LoRAPair(
            0.02 * torch.randn(RANK, module.in_features),
            0.02 * torch.randn(module.out_features, RANK),
        )
        for name, module in modules.items()
    }
    targets = TARGETS if kind.startswith("llama") else list(modules)
    config = gauge_ext.LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    write_adapter(config, pairs, folder / "adapter")
    (folder / "onnx").mkdir()
    export_tasks.export(model, inputs, folder / "onnx" / "model.onnx")


def differences(folder: Path) -> dict[str, float]:
    """The largest difference of a weight between ours and the way by hand, in each of the two."""
    import numpy as np
    from onnx import load, numpy_helper
    from safetensors import safe_open

    found = {"ONNX file": 0.0, "checkpoint": 0.0}
    paths = [folder / f"out_{name}" / "model.onnx" for name in ("patch", "onnx_numpy")]
    graphs = [load(str(path), load_external_data=False).graph for path in paths]
    others = {tensor.name: tensor for tensor in graphs[1].initializer}
    for tensor in graphs[0].initializer:
        one, two = (
            numpy_helper.to_array(t, base_dir=str(path.parent))
            for t, path in zip((tensor, others[tensor.name]), paths, strict=True)
        )
        if one.size and one.dtype.kind == "f":
            gap = np.abs(one.ravel() - two.ravel()).max()
            found["ONNX file"] = max(found["ONNX file"], float(gap))
    files = [folder / f"out_{name}" / "model.safetensors" for name in ("merge", "peft_save")]
    with safe_open(files[0], "np") as ours, safe_open(files[1], "np") as peft:
        names = set(ours.keys()) & set(peft.keys())
        for name in names:
            gap = np.abs(ours.get_tensor(name) - peft.get_tensor(name)).max()
            found["checkpoint"] = max(found["checkpoint"], float(gap))
    assert names
    return found


def goals(costs: dict[str, Cost]) -> Iterator[tuple[str, bool]]:
    """What is wanted of ours, and whether it is so."""
    for floor, ours, *_ in GROUPS.values():
        extra = costs[ours].peak - costs["numpy_alone"].peak
        ratio = costs[ours].cpu / costs[floor].cpu
        yield (
            f"{NAMES[ours]}: {extra:.0f} MiB above numpy alone, at most {GOAL_MEMORY:.0f}",
            extra <= GOAL_MEMORY,
        )
        yield (
            f"{NAMES[ours]}: {ratio:.1f} x the CPU time of a plain copy, at most {GOAL_CPU:.0f}",
            ratio <= GOAL_CPU,
        )


def show(kind: str, size: int, costs: dict[str, Cost], gaps: dict[str, float]) -> None:
    """Print a table and the goals."""
    console = Console()
    table = Table(title=f"{kind}: {size / 2**20:,.0f} MiB of weights", title_justify="left")
    for heading in ("", "way", "CPU s", "wall s", "peak MiB", "x CPU of copy"):
        table.add_column(heading, justify="left" if heading in {"", "way"} else "right")
    for group, tasks in GROUPS.items():
        for number, task in enumerate(tasks):
            cost = costs[task]
            table.add_row(
                "" if number else group,
                NAMES[task],
                f"{cost.cpu:.2f}",
                f"{cost.wall:.2f}",
                f"{cost.peak:,.0f}",
                f"{cost.cpu / costs[tasks[0]].cpu:.1f}",
            )
        table.add_section()
    console.print(table)
    for group, gap in gaps.items():
        console.print(f"{group}: ours and the other way differ by {gap:.1e} at most")
    for text, met in goals(costs):
        console.print(f"goal {'met  ' if met else 'SHORT'}  {text}", highlight=False)


def main(
    quick: Annotated[bool, typer.Option(help="Small models, one round.")] = False,
    rounds: Rounds = 3,
    folder: Folder = None,
    json_file: JsonFile = None,
) -> None:
    """Measure every way and print a table for each model."""
    figures: dict[str, Any] = {"machine": machine()}
    for kind in QUICK if quick else FULL:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            place = Path(name)
            prepare(kind, place)
            size = sum(file.stat().st_size for file in (place / "base").iterdir())
            best: dict[str, Cost] = {}
            for _ in range(1 if quick else rounds):
                for task in ("numpy_alone", *(t for tasks in GROUPS.values() for t in tasks)):
                    cost = run(task, place, kind)
                    old = best.get(task, cost)
                    best[task] = Cost(
                        min(old.cpu, cost.cpu), min(old.wall, cost.wall), max(old.peak, cost.peak)
                    )
                    if task.startswith("copy"):
                        shutil.rmtree(place / f"out_{task}")
            gaps = differences(place)
            show(kind, size, best, gaps)
            figures[kind] = {
                "bytes": size,
                "costs": {task: asdict(cost) for task, cost in best.items()},
                "differences": gaps,
                "goals": dict(goals(best)),
            }
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
