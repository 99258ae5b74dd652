"""How many threads are of use right now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gauge_ext.demo.latency import interleaved


@contextmanager
def useful_threads(
    work: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Iterator[int]:
    """Lets torch use one thread or all of its own in the block, whichever does ``work`` faster.

    OpenMP's threads wait for each other by spinning. Where another process keeps a core busy, the
    thread that cannot run makes all the others wait: on two cores, of which one was in use, two
    threads took eight times as long as one.

    Args:
        work: A sample of what the block will do.
        clock: Seconds.

    Yields:
        The number of threads in use.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(_faster(work, threads, clock))
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)


def _faster(work: Callable[[], object], threads: int, clock: Callable[[], float]) -> int:
    if threads == 1:
        return 1

    def with_threads(count: int) -> Callable[[], object]:
        def call() -> object:
            torch.set_num_threads(count)
            return work()

        return call

    calls = {str(n): with_threads(n) for n in (threads, 1)}
    trial = interleaved("", calls, rounds=3, warmups=1, clock=clock)
    return int(min(trial.seconds, key=lambda name: trial.seconds[name]))
