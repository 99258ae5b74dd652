"""``gauge-ext doctor``: what this installation is, runs on, and lacks."""

from __future__ import annotations

import typer

from gauge_ext.cli import options
from gauge_ext.cli.console import print_json, stdout
from gauge_ext.cli.problems import explains_errors


@explains_errors
def doctor(as_json: options.Json = False) -> None:
    """Show versions, build, hardware, and what is missing.

    Exits with status 1 when something that every use needs is missing; the report says what to
    type. Paste it into an issue.
    """
    from gauge_ext.doctor import collect, render

    info = collect()
    if as_json:
        print_json(info)
    else:
        render(info, stdout())
    if not info["healthy"]:
        raise typer.Exit(1)
