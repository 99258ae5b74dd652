"""What the demo found, as tables and as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gauge_ext._version import __version__
from gauge_ext.demo.latency import Latency
from gauge_ext.demo.metrics import Retrieval
from gauge_ext.demo.search import Hit

if TYPE_CHECKING:
    from rich.console import Console

    from gauge_ext.export import ExportReport


@dataclass(frozen=True)
class Score:
    """One stage's search among the held-out names.

    The ONNX file alone, which encodes them fastest, also searches all names of the library.
    """

    stage: str
    held_out: Retrieval
    library: Retrieval | None = None


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured, and where it put what it made.

    Attributes:
        seed: The seed of split, initialisation, dropout and order.
        epochs: Passes over the training pairs.
        train_pairs: Number of pairs trained on.
        held_out_pairs: Number of pairs kept for the scores.
        losses: The loss of every step.
        scores: Before, after, and the ONNX file alone, in this order.
        latencies: onnxruntime against torch, a job each.
        answers: Query -> the names found for it by the ONNX file alone.
        export: The exporter's report, with the validation in it.
        adapter: Folder of the adapter, in PEFT's format.
        onnx: The merged model.
        tokenizer: The tokenizer that belongs to it.
        report: This result as JSON.
        seconds: Step -> wall time.
    """

    seed: int
    epochs: int
    train_pairs: int
    held_out_pairs: int
    losses: list[float]
    scores: list[Score]
    latencies: list[Latency]
    answers: dict[str, list[Hit]]
    export: ExportReport
    adapter: Path
    onnx: Path
    tokenizer: Path
    report: Path
    seconds: dict[str, float]

    def render(self, console: Console) -> None:
        """Prints the tables: scores, latency, answers, and where everything lies."""
        _show_scores(self.scores, console)
        _show_latencies(self.latencies, console)
        _show_answers(self.answers, console)
        _show_files(self, console)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "versions": {
                "gauge_ext": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "onnxruntime": metadata.version("onnxruntime"),
            },
            "seed": self.seed,
            "epochs": self.epochs,
            "train_pairs": self.train_pairs,
            "held_out_pairs": self.held_out_pairs,
            "losses": self.losses,
            "scores": [asdict(score) for score in self.scores],
            "latencies": [asdict(latency) for latency in self.latencies],
            "answers": {q: [asdict(hit) for hit in hits] for q, hits in self.answers.items()},
            "export": self.export.to_dict(),
            "files": {
                "adapter": str(self.adapter),
                "onnx": str(self.onnx),
                "tokenizer": str(self.tokenizer),
                "report": str(self.report),
            },
            "seconds": {step: round(value, 2) for step, value in self.seconds.items()},
        }


def _show_scores(scores: list[Score], console: Console) -> None:
    """Prints recall@1 and MRR, a stage a row."""
    from rich.table import Table

    table = Table(title="Search by a sentence that training did not see")
    table.add_column("")
    table.add_column("among", justify="right")
    table.add_column("recall@1", justify="right")
    table.add_column("MRR", justify="right")
    for score in scores:
        for found in (score.held_out, score.library):
            if found is not None:
                figures = (f"{found.recall_at_1:.3f}", f"{found.mrr:.3f}")
                table.add_row(score.stage, f"{found.candidates:,} names", *figures)
    console.print(table)


def _show_latencies(latencies: list[Latency], console: Console) -> None:
    """Prints medians, a job a row, and how many times faster than torch onnxruntime was."""
    from rich.table import Table

    table = Table(title="Latency of the merged model: one thread, in turn, medians")
    table.add_column("")
    for heading in ("torch", "onnxruntime", "torch / onnxruntime"):
        table.add_column(heading, justify="right")
    for latency in latencies:
        times = [f"{latency.seconds[name] * 1e3:.2f} ms" for name in ("torch", "onnxruntime")]
        table.add_row(latency.job, *times, f"{latency.ratio('torch', 'onnxruntime'):.2f}")
    console.print(table)


def _show_answers(answers: dict[str, list[Hit]], console: Console) -> None:
    """Prints each query with the names found for it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Three queries, answered by the ONNX file and its tokenizer alone")
    table.add_column("query")
    table.add_column("found")
    table.add_column("cosine", justify="right")
    for query, hits in answers.items():
        names = "\n".join(hit.name for hit in hits)
        cosines = "\n".join(f"{hit.score:.3f}" for hit in hits)
        table.add_row(Text(query), Text(names), cosines, end_section=True)
    console.print(table)


def _show_files(result: DemoResult, console: Console) -> None:
    """Says where everything lies and what to try next."""
    from rich.text import Text

    lines = [
        ("adapter", result.adapter, "PEFT's format"),
        ("model", result.onnx, f"{result.onnx.stat().st_size / 2**20:.0f} MiB, merged, validated"),
        ("tokenizer", result.tokenizer, ""),
        ("report", result.report, "all numbers of this page"),
    ]
    for what, path, note in lines:
        console.print(Text(f"{what:>10}  {path}" + (f"  ({note})" if note else "")), soft_wrap=True)
    steps = ", ".join(f"{step} {value:.0f} s" for step, value in result.seconds.items())
    console.print(f"{sum(result.seconds.values()):.0f} s in all: {steps}.", soft_wrap=True)
    console.print(
        Text(f"Look at the adapter with: gauge-ext inspect {result.adapter}"), soft_wrap=True
    )
