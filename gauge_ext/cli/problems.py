"""How an error reaches the user: one paragraph that names the option and the mend, no traceback."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.text import Text

from gauge_ext.cli.console import stderr
from gauge_ext.errors import GaugeError

P = ParamSpec("P")
R = TypeVar("R")


class OptionError(GaugeError):
    """A user's error, with the option or argument that has to change.

    Args:
        option: As the user types it, such as ``--adapter``, or ``BASE``.
        message: What is wrong.
        hint: What to do about it.
    """

    def __init__(self, option: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


@contextmanager
def blame(option: str, others: Mapping[type[GaugeError], str] | None = None) -> Iterator[None]:
    """Turn a GaugeError raised inside into an OptionError.

    Args:
        option: The option at fault, unless ``others`` knows better.
        others: Options by the kind of error; the first kind that fits wins.
    """
    try:
        yield
    except OptionError:
        raise
    except GaugeError as error:
        fitting = (name for kind, name in (others or {}).items() if isinstance(error, kind))
        raise OptionError(next(fitting, option), error.message, hint=error.hint) from error


def first_line(error: BaseException) -> str:
    """Describe somebody else's exception in one line: its type and the first line it says.

    Without a full stop at the end, so that it can stand in a sentence.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}".rstrip(".") if lines else type(error).__name__


def explain(error: Exception) -> None:
    """Print an error as one paragraph on stderr."""
    text = Text("error: ", style="bold red", end="")
    if isinstance(error, OptionError):
        text.append(f"{error.option}: ", style="bold")
    words = str(error) if isinstance(error, GaugeError) else first_line(error)
    text.append(" ".join(words.splitlines()), style="not bold default")
    stderr.print(text, soft_wrap=True)


def explains_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Make a command leave with status 1 and one paragraph when the user can mend the cause.

    An OSError is the machine's answer (no permission, disk full) and is explained too. Anything
    else is a bug of ours and keeps its traceback. Warnings are one line, without the source.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except (GaugeError, OSError) as error:
                explain(error)
                raise typer.Exit(1) from error

    return wrapped


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    text = Text("warning: ", style="bold yellow", end="")
    text.append(" ".join(str(message).splitlines()), style="not bold default")
    stderr.print(text, soft_wrap=True)
