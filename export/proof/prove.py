"""Everything that can be said about an export, in one run: differences, speed, memory, text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.export.proof.measure import Latency, Memory, interleaved, measure_memory
from gauge_ext.export.proof.perplexity import Perplexity
from gauge_ext.export.proof.runtimes import open_runtime
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.proof.timed import runtime_call, timed_cases, torch_call
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.session import open_session
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.validate import Progress

if TYPE_CHECKING:
    from rich.console import Console

BATCHES = (1, 8)


@dataclass(frozen=True)
class Proof:
    """What was found about an export.

    Attributes:
        path: The file or folder.
        validations: Graph by graph and runtime by runtime, against torch.
        latencies: Call times side by side; empty if not asked for.
        memories: Peak memory; empty if not asked for.
        perplexity: Of a text; None if not asked for.
        provenance: The metadata of the first graph.
    """

    path: Path
    validations: tuple[ValidationReport, ...]
    latencies: tuple[Latency, ...]
    memories: tuple[Memory, ...]
    perplexity: Perplexity | None
    provenance: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every output in every runtime is within the tolerance, and the perplexity is."""
        return all(report.passed for report in self.validations) and (
            self.perplexity is None or self.perplexity.passed
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each thing that failed."""
        lines = [
            f"{report.path.name}, {report.runtime}, {line}"
            for report in self.validations
            for line in report.failures
        ]
        if self.perplexity is not None and not self.perplexity.passed:
            found = self.perplexity
            lines.append(
                f"perplexity {found.onnx:.4f}, torch's is {found.torch:.4f}: "
                f"{found.difference:+.2e} > {found.limit:.0e}"
            )
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        perplexity = None
        if self.perplexity is not None:
            perplexity = {**asdict(self.perplexity), "difference": self.perplexity.difference}
        return {
            "path": str(self.path),
            "passed": self.passed,
            "failures": list(self.failures),
            "validations": [report.to_dict() for report in self.validations],
            "latencies": [asdict(row) for row in self.latencies],
            "memories": [asdict(row) for row in self.memories],
            "perplexity": perplexity,
            "provenance": self.provenance,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs nothing else; see :mod:`gauge_ext.export.proof.page`."""
        from gauge_ext.export.proof.page import proof_page

        return proof_page(self)

    def render(self, console: Console) -> None:
        """Prints each validation's table, then a line for each measurement."""
        for report in self.validations:
            report.render(console)
        for latency in self.latencies:
            times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in latency.seconds.items())
            console.print(
                f"latency, {latency.what}, batch {latency.batch}: {times} "
                f"(medians of {latency.rounds} rounds in turns)",
                highlight=False,
                markup=False,
            )
        for memory in self.memories:
            console.print(
                f"memory of onnxruntime, {memory.what}, batch {memory.batch}: "
                f"{memory.run / 2**20:.1f} MiB at most, file {memory.weights / 2**20:.1f} MiB",
                highlight=False,
                markup=False,
            )
        if self.perplexity is not None:
            found = self.perplexity
            console.print(
                f"perplexity of {found.tokens} tokens: torch {found.torch:.4f}, onnxruntime "
                f"{found.onnx:.4f} ({found.difference:+.1e})",
                highlight=False,
                markup=False,
            )


def prove(
    path: Path,
    subjects: Sequence[Subject],
    *,
    wholes: Sequence[Callable[[], ValidationReport]] = (),
    runtimes: Sequence[str] = ("onnxruntime",),
    tolerance: Tolerance | None = None,
    seed: int = 0,
    latency: float = 0.0,
    memory: bool = False,
    batches: Sequence[int] = BATCHES,
    perplexity: Callable[[], Perplexity] | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Validates graphs in every runtime, and measures what is asked for.

    Args:
        path: What to call it: the file, or the folder of the graphs.
        subjects: The graphs and what they have to equal.
        wholes: More comparisons, of the graphs together.
        runtimes: Names of :data:`gauge_ext.export.proof.runtimes.RUNTIMES`.
        tolerance: The bar; by default by dtype.
        seed: Of the inputs.
        latency: Seconds to spend on each row of timings; 0 for none.
        memory: Whether to measure peak memory.
        batches: Batch sizes of both.
        perplexity: Computes the perplexity of a text.
        progress: Called with what is being done and the share done.

    Raises:
        ConfigError: a runtime is unknown or not installed, or inputs do not fit.
        ExportError: a runtime cannot load or run a graph.
    """
    tell = progress or (lambda what, share: None)
    total = len(subjects) * (len(runtimes) + bool(latency) + memory) + len(wholes)
    done = 0
    validations: list[ValidationReport] = []
    latencies: list[Latency] = []
    memories: list[Memory] = []
    for subject in subjects:
        with contextlib.ExitStack() as stack:
            opened = {}
            for name in runtimes:
                tell(f"validating {subject.path.name} in {name}", done / total)
                opened[name] = stack.enter_context(open_runtime(name, subject.path))
                validations.append(
                    subject.validate(tolerance=tolerance, seed=seed, runtime=opened[name])
                )
                done += 1
            if latency:
                tell(f"timing {subject.path.name}", done / total)
                for label, batch, case, feeds in timed_cases(subject, batches, seed):
                    calls: dict[str, Callable[[], float | None]] = {
                        "torch": torch_call(subject.module, case)
                    }
                    calls |= {
                        name: runtime_call(runtime, subject.path, feeds)
                        for name, runtime in opened.items()
                    }
                    seconds, rounds = interleaved(calls, seconds=latency)
                    latencies.append(Latency(label, batch, seconds, rounds))
                done += 1
        if memory:
            tell(f"measuring the memory of {subject.path.name}", done / total)
            for label, batch, _, feeds in timed_cases(subject, batches, seed):
                memories.append(measure_memory(label, batch, subject.path, feeds))
            done += 1
    for whole in wholes:
        tell("validating the loop", done / total)
        validations.append(whole())
        done += 1
    metadata = open_session(subjects[0].path)[0].get_modelmeta().custom_metadata_map
    return Proof(
        path=path,
        validations=tuple(validations),
        latencies=tuple(latencies),
        memories=tuple(memories),
        perplexity=None if perplexity is None else perplexity(),
        provenance=dict(metadata),
    )
