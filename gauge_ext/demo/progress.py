"""Showing how far a long step is, and keeping the time of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Update(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows that ``done`` of ``total`` is done."""


@contextmanager
def progress_bar(console: Console, what: str, unit: str) -> Iterator[Update]:
    """Shows a progress bar where there is a terminal; yields ``update(done, total, note)``."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=None, count="", note="")

        def update(done: int, total: int, note: str = "") -> None:
            count = f"{done}/{total} {unit}" if unit else f"{done / total:.0%}"
            progress.update(task, completed=done, total=total, count=count, note=note)

        yield update


class Clock:
    """Adds up the wall time of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times the block and adds it to ``name``."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
