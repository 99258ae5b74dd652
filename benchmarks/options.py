"""Options that benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path | None, typer.Option(help="Where files may be written.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each way runs.")]
Threads = Annotated[int, typer.Option(help="torch's threads.")]
