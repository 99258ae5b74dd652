"""What ``export``, ``validate`` and ``provenance`` share: the adapted model, and its reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from gauge_ext.cli.base import Inputs, add_adapter, check_adapter, example_inputs, load_base
from gauge_ext.cli.console import stdout, working
from gauge_ext.cli.files import check_target, write_text
from gauge_ext.cli.problems import blame

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from gauge_ext.cli.base import Base
    from gauge_ext.export import Tolerance

Architecture = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="Load a transformers folder as this class (such as BertModel) instead of the one "
        "that its config names.",
        show_default=False,
    ),
]
RandomCases = Annotated[
    int,
    typer.Option(
        "--random-cases", min=0, metavar="N", help="Random inputs to compare, beside the example."
    ),
]


class Report(Protocol):
    """What a command found."""

    def to_json(self) -> str:
        """As JSON."""
        ...

    def render(self, console: Console) -> None:
        """As text."""
        ...


def check_targets(**targets: Path | None) -> None:
    """Refuse files that can't be written, before any work; keywords are the options' names."""
    for option, target in targets.items():
        if target is not None:
            check_target(target, f"--{option}")


def load_adapted(
    spec: str,
    adapter: Path | None,
    architecture: str | None,
    option: str = "BASE",
    *,
    bare: bool = False,
) -> Base:
    """Load the base with its adapter; the cheap checks come first.

    Args:
        spec: BASE.
        adapter: The adapter's folder.
        architecture: Class of transformers to load a folder as.
        option: The option that named the base.
        bare: Whether a base without any adapter will do.
    """
    with working("loading"), blame(option):
        check_adapter(adapter)
        base = load_base(spec, architecture=architecture)
        if adapter is not None or not bare:
            add_adapter(base, adapter)
    return base


def load_with_inputs(
    spec: str,
    adapter: Path | None,
    architecture: str | None,
    batch: int | None,
    sequence: int | None,
    seed: int,
    option: str = "BASE",
    *,
    bare: bool = False,
) -> tuple[nn.Module, Inputs, Any]:
    """Load the base with its adapter and example inputs."""
    with working("loading"), blame(option):
        check_adapter(adapter)
        base = load_base(spec, architecture=architecture)
        inputs, shapes = example_inputs(base, batch=batch, sequence=sequence, seed=seed)
        if adapter is not None or not bare:
            add_adapter(base, adapter)
    return base.model, inputs, shapes


def tolerance_of(largest: float | None) -> Tolerance | None:
    """The bar that ``--tolerance`` sets; None for the usual one."""
    from gauge_ext.export import Tolerance

    return None if largest is None else Tolerance.within(largest)


def show(report: Report, file: Path | None, as_json: bool) -> None:
    """Print a report, and write it where ``--report`` says."""
    if file is not None:
        write_text(file, report.to_json() + "\n", "--report")
    if as_json:
        typer.echo(report.to_json())
    else:
        report.render(stdout())
