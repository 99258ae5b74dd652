"""What a long piece of work is doing, for whoever waits for it, and how long each step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gauge_ext.export.validate import Progress


def within(progress: Progress, start: float, end: float) -> Progress:
    """Return a progress function for a part of the whole, from ``start`` to ``end``."""
    return lambda what, share: progress(what, start + (end - start) * share)


class Steps:
    """Tells the caller what is going on, and keeps the time.

    Attributes:
        seconds: Name of each step that is over -> what it took.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    def tell(self, what: str, share: float) -> None:
        """Say what is being done, and the share done, in [0, 1]."""
        if self._progress is not None:
            self._progress(what, share)

    def within(self, start: float, end: float) -> Progress:
        """A progress function for a part of the whole."""
        return within(self.tell, start, end)

    @contextmanager
    def step(self, name: str, what: str, share: float) -> Iterator[None]:
        """Say what is being done, and note under ``name`` the time until it is."""
        self.tell(what, share)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
