"""How every benchmark here measures: side by side in one process, round by round, medians.

The machines are small and shared, so absolute times say little; what is quoted is the ratio to the
frozen base layer, taken within each round, whose noise hits both sides alike.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Seconds a call in each round, and the ratio to the baseline round by round."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of the ratios to the baseline."""
        return statistics.median(self.ratios)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 15,
    slice_seconds: float = 0.01,
) -> dict[str, Timing]:
    """Time the functions in turn, many rounds of a short slice each.

    Args:
        functions: What to call, by name.
        baseline: The name that ratios are taken to.
        rounds: How often each function gets its slice; the order rotates.
        slice_seconds: About how long a slice is; a function that takes longer runs once.

    Returns:
        A timing for each name.
    """
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, round(slice_seconds / once))
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            function, count = functions[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            seconds[name].append((time.perf_counter() - start) / count)
    base = seconds[baseline]
    return {
        name: Timing(tuple(times), tuple(t / b for t, b in zip(times, base, strict=True)))
        for name, times in seconds.items()
    }


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward, parameters left out, each once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, the right one for ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs))


def machine() -> dict[str, str | int]:
    """Say what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
