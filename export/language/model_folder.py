"""A folder of graphs that generate, and what belongs to them: configs, tokenizer, manifest."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext._version import __version__
from gauge_ext.export.disk.files import write_errors
from gauge_ext.export.metadata import append_metadata, summary
from gauge_ext.export.report import ExportReport, ValidationReport

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

MANIFEST = "gauge_ext.json"
# What tokenizers and processors of transformers are made of. Weights and their index stay behind.
_CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "spm.*", "chat_template*", "preprocessor_config.json", "processor_config.json"),
    *("normalizer.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class ModelReport:
    """What an export of a generating model wrote.

    Attributes:
        path: The folder.
        task: ``text-generation`` or ``seq2seq``.
        graphs: One report for each graph, with its validation.
        files: Every file in the folder.
        bytes_written: Their sizes, added up.
        whole: The graphs run as a loop, against the plain torch model; None if not validated.
    """

    path: Path
    task: str
    graphs: tuple[ExportReport, ...]
    files: tuple[Path, ...]
    bytes_written: int
    whole: ValidationReport | None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "path": str(self.path),
            "task": self.task,
            "files": [str(file) for file in self.files],
            "bytes_written": self.bytes_written,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "whole": None if self.whole is None else self.whole.to_dict(),
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
        console.print(
            f"{self.path}: {self.task}, {len(self.files)} files, "
            f"{self.bytes_written / 2**20:,.1f} MiB",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def write_settings(
    model: nn.Module, folder: Path, source: Path | None, more: Mapping[str, Any] | None = None
) -> None:
    """Writes a model's configs into a folder, and copies its tokenizer or processor there.

    Args:
        model: A generating model of transformers.
        folder: Where to.
        source: The folder that the model was loaded from, or None.
        more: Name of a further file -> what to write into it as JSON.

    Raises:
        WriteError: the folder cannot be written.
    """
    held: Any = model
    config = copy.deepcopy(held.config)
    # Loading for a plain export switches the cache off; here it is what the graphs are about.
    config.use_cache = config.get_text_config().use_cache = True
    with write_errors(folder):
        config.save_pretrained(folder)
        if getattr(held, "generation_config", None) is not None:
            generation = copy.deepcopy(held.generation_config)
            generation.use_cache = True
            generation.save_pretrained(folder)
        if source is not None:
            for file in sorted({f for pattern in _CARRIED for f in source.glob(pattern)}):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        for name, value in (more or {}).items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def settle(
    report: ExportReport,
    draft: Path,
    validation: ValidationReport | None,
    whole: ValidationReport | None = None,
) -> ExportReport:
    """Writes what validation found into a draft, and into its report.

    Args:
        report: The report of a draft that was not validated as it was written.
        draft: The folder that the draft is in.
        validation: What was found about it; None if it was not validated.
        whole: What was found about it together with others.
    """
    if validation is None:
        return report
    file = draft / report.path.name
    said = summary(*(found for found in (validation, whole) if found is not None))
    append_metadata(file, said)
    size = sum((draft / part.name).stat().st_size for part in report.files)
    return replace(
        report,
        provenance={**report.provenance, **said},
        bytes_written=size,
        validation=validation,
    )


def write_manifest(draft: Path, task: str) -> None:
    """Writes the hash of every file in a folder into its ``gauge_ext.json``.

    Raises:
        WriteError: it cannot be written.
    """
    with write_errors(draft):
        files = sorted(file for file in draft.iterdir() if file.is_file())
        manifest = {
            "version": __version__,
            "task": task,
            "files": {
                file.name: {"sha256": file_sha256(file), "bytes": file.stat().st_size}
                for file in files
            },
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report_of(
    draft: Path,
    folder: Path,
    task: str,
    graphs: Iterable[ExportReport],
    whole: ValidationReport | None,
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
    )


def placed(report: ValidationReport, folder: Path) -> ValidationReport:
    """A draft's validation with the path that the file will have."""
    return replace(report, path=folder / report.path.name)
