"""Where the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# A pipe or a file has no width; 80 columns would fold every layer's name.
_PIPE_WIDTH = 160

stderr = Console(stderr=True)


def stdout() -> Console:
    """Return the console for results, wide where no terminal limits it."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def print_json(value: Any) -> None:
    """Print plain values as strict JSON (no NaN), and nothing else, on stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    """Print a remark on stderr."""
    stderr.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on stderr while the block runs.

    Whatever the block prints on stdout goes to stderr, so that a model's or a library's chatter
    never mixes with a result (``--json`` must stay JSON).

    Args:
        what: What is being done, until the block says more.

    Yields:
        ``update(what, fraction done in [0, 1])``; until it is called the bar only pulses.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(
            *columns, console=stderr, transient=True, disable=not stderr.is_terminal
        ) as progress,
    ):
        task = progress.add_task(what, total=None)

        def update(step: str, fraction: float) -> None:
            progress.update(task, description=step, total=1.0, completed=fraction)

        yield update
