"""Comparing the speed of functions that do one and the same job."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gauge_ext.errors import ConfigError


@dataclass(frozen=True)
class Latency:
    """Times of the contestants for one job.

    Attributes:
        job: What was done, in words.
        seconds: Contestant -> median wall time of a call.
        rounds: Calls of each.
    """

    job: str
    seconds: dict[str, float]
    rounds: int

    def ratio(self, slow: str, fast: str) -> float:
        """Returns how many times as long ``slow`` took as ``fast``."""
        return self.seconds[slow] / self.seconds[fast]


def interleaved(
    job: str,
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmups: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Times the contestants in turn, round after round, and takes medians.

    Whatever else the machine does falls on all of them alike, and a median forgets the moments in
    which it did. The order turns round every time, for the second finds a warmer cache.

    Args:
        job: What is done, in words.
        contestants: Name -> the call to time.
        rounds: Timed calls of each, >= 1.
        warmups: Untimed calls of each before.
        clock: Seconds.

    Raises:
        ConfigError: Fewer than one round, or nobody to time.
    """
    if rounds < 1 or not contestants:
        raise ConfigError(
            f"timing needs at least one round and one contestant, got {rounds} rounds of "
            f"{len(contestants)}."
        )
    for _ in range(warmups):
        for call in contestants.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        for name in order:
            started = clock()
            contestants[name]()
            times[name].append(clock() - started)
        order.reverse()
    return Latency(job, {name: statistics.median(t) for name, t in times.items()}, rounds)
