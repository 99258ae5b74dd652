"""Times of single calls on a GPU, by its own events; on the CPU, to try things out, by a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from measure import Timing

# More than the L2 cache of any GPU so far
ROTATED_BYTES = 256 * 2**20


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    """Return how long one call takes the device."""
    if device.type == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def in_turn(
    device: torch.device, functions: Mapping[str, Callable[[], object]], baseline: str, rounds: int
) -> dict[str, Timing]:
    """Time one call of each function in every round, in an order that rotates."""
    for function in functions.values():
        for _ in range(5):
            function()
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(device, functions[name]))
    return {
        name: Timing(tuple(own), tuple(t / b for t, b in zip(own, taken[baseline], strict=True)))
        for name, own in taken.items()
    }


def copies(bytes_each: int, device: torch.device) -> int:
    """Return how many inputs to take in turn, so that none is found in the cache."""
    return 2 if device.type == "cpu" else min(max(2, -(-ROTATED_BYTES // bytes_each)), 64)


def name(device: torch.device) -> str:
    """Say what the figures were measured on."""
    what = "the CPU, to try it out" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{what}, torch {torch.__version__}"


def why_not(device: torch.device, has_kernels: bool) -> str | None:
    """Return why nothing can be measured there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return (
            "There is no GPU here; bench_lora_linear.py measures the CPU, --device cpu tries this."
        )
    if device.type == "cuda" and not has_kernels:
        return "This build has no CUDA kernels: GAUGE_EXT_CUDA=1 pip install says why."
    return None
