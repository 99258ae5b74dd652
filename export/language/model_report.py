"""What became of a model that generates: its graphs, the loop, and what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.export.report import ExportReport, ValidationReport

if TYPE_CHECKING:
    from rich.console import Console

    from gauge_ext.export.language.loop import Generated


@dataclass(frozen=True)
class ModelReport:
    """What an export of a generating model wrote.

    Attributes:
        path: The folder.
        task: ``text-generation`` or ``seq2seq``.
        graphs: One report for each graph, with its validation.
        files: Every file in the folder.
        bytes_written: Their sizes, added up.
        whole: The graphs run as a loop, in float32, against the plain torch model; None if not
            validated.
        measured: The same with the graphs in fewer bits: measured, and not judged; None in float32.
        generated: What the graphs as they are written generate, beside torch's choices.
    """

    path: Path
    task: str
    graphs: tuple[ExportReport, ...]
    files: tuple[Path, ...]
    bytes_written: int
    whole: ValidationReport | None
    measured: ValidationReport | None = None
    generated: tuple[Generated, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "path": str(self.path),
            "task": self.task,
            "files": [str(file) for file in self.files],
            "bytes_written": self.bytes_written,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "whole": None if self.whole is None else self.whole.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "generated": [{**asdict(one), "top1": one.top1} for one in self.generated],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console) -> None:
        """Prints each graph's report, then the loop's."""
        for graph in self.graphs:
            graph.render(console)
        if self.whole is not None:
            self.whole.render(console)
        if self.measured is not None:
            console.print("the same loop in fewer bits, measured without a bar:")
            self.measured.render(console)
        for one in self.generated:
            console.print(
                f"generation, {one.name}: {one.agreed} of {one.tokens} tokens are torch's first "
                f"choice ({one.top1:.1%})",
                highlight=False,
                markup=False,
            )
        console.print(
            f"{self.path}: {self.task}, {len(self.files)} files, "
            f"{self.bytes_written / 2**20:,.1f} MiB",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def report_of(
    draft: Path,
    folder: Path,
    task: str,
    graphs: Iterable[ExportReport],
    whole: ValidationReport | None,
    measured: ValidationReport | None,
    generated: tuple[Generated, ...],
) -> ModelReport:
    """The report of a finished draft, with the paths that its files will have."""
    files = sorted(file for file in draft.iterdir() if file.is_file())
    return ModelReport(
        path=folder,
        task=task,
        graphs=tuple(
            replace(
                graph,
                path=folder / graph.path.name,
                files=tuple(folder / file.name for file in graph.files),
                validation=None if graph.validation is None else placed(graph.validation, folder),
            )
            for graph in graphs
        ),
        files=tuple(folder / file.name for file in files),
        bytes_written=sum(file.stat().st_size for file in files),
        whole=None if whole is None else placed(whole, folder),
        measured=None if measured is None else placed(measured, folder),
        generated=generated,
    )


def placed(report: ValidationReport, folder: Path) -> ValidationReport:
    """A draft's validation with the path that the file will have."""
    return replace(report, path=folder / report.path.name)
