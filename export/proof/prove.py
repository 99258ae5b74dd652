"""Everything that can be said about an export, in one run: differences, speed, memory, text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.metadata import read_bounds
from gauge_ext.export.proof.measure import Latency, Memory, interleaved, measure_memory
from gauge_ext.export.proof.runtimes import open_runtime
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import Case, make_cases
from gauge_ext.export.trace.inputs import bind_inputs
from gauge_ext.export.validate import (
    Progress,
    Runtime,
    evaluation_copy,
    fixed_feeds,
    match_inputs,
    open_session,
)

if TYPE_CHECKING:
    from rich.console import Console

BATCHES = (1, 8)


@dataclass(frozen=True)
class Perplexity:
    """The same text through both.

    Attributes:
        tokens: How many tokens it has.
        torch: Perplexity of the torch model.
        onnx: Perplexity of the graph.
        limit: The largest |onnx / torch - 1| allowed.
    """

    tokens: int
    torch: float
    onnx: float
    limit: float = 1e-3

    @property
    def difference(self) -> float:
        """Perplexity of the graph over that of torch, less one."""
        return self.onnx / self.torch - 1.0

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return abs(self.difference) <= self.limit


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
                for label, batch, case, feeds in _timed(subject, batches, seed):
                    calls: dict[str, Callable[[], float | None]] = {
                        "torch": _torch_call(subject.module, case)
                    }
                    calls |= {
                        name: _runtime_call(runtime, subject.path, feeds)
                        for name, runtime in opened.items()
                    }
                    seconds, rounds = interleaved(calls, seconds=latency)
                    latencies.append(Latency(label, batch, seconds, rounds))
                done += 1
        if memory:
            tell(f"measuring the memory of {subject.path.name}", done / total)
            for label, batch, _, feeds in _timed(subject, batches, seed):
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


def text_perplexity(folder: Path, model: nn.Module, text: str, *, window: int = 512) -> Perplexity:
    """The perplexity of a text in torch and in the graph of a folder, with the folder's tokenizer.

    Raises:
        ConfigError: the folder has no tokenizer, or the text is too short.
    """
    from gauge_ext.export.language.generate import OnnxGenerator

    tokens = torch.tensor(_tokenize(folder, text), dtype=torch.int64)
    reference: Any = evaluation_copy(model)
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    window = min(window, positions or window)
    found = OnnxGenerator(folder).perplexity(tokens, window=window)
    total, count = 0.0, 0
    for piece in tokens.split(window):
        if len(piece) < 2:
            continue
        with torch.no_grad():
            logits = reference(input_ids=piece[None], use_cache=False).logits[0, :-1]
        chances = logits.double().log_softmax(-1)
        total -= float(chances.gather(-1, piece[1:, None]).sum())
        count += len(piece) - 1
    return Perplexity(len(tokens), float(torch.tensor(total / count).exp()), found)


def _tokenize(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(
            f"{folder} has no tokenizer, so the text cannot be turned into tokens.",
            hint="Export from a folder that has one.",
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens, and at least 2 are needed.")
    return ids


def _timed(
    subject: Subject, batches: Sequence[int], seed: int
) -> list[tuple[str, int, Case, dict[str, Any]]]:
    """What to time: label, batch size, inputs for torch, the same for the graph."""
    example = bind_inputs(subject.module, subject.example)
    session, _ = open_session(subject.path)
    fixed = fixed_feeds(session, subject.module)
    shapes, names = match_inputs(session, example, fixed)
    batch_name = next((shape[0] for shape in shapes if shape and isinstance(shape[0], str)), None)
    sizes = {
        dim: size
        for tensor, shape in zip(example.tensors, shapes, strict=True)
        for size, dim in zip(tensor.shape, shape, strict=True)
        if isinstance(dim, str)
    }
    plans: dict[str, tuple[int, dict[str, int]]] = {}
    for label, given in (subject.timed or {"example's sizes": {}}).items():
        for batch in batches if batch_name is not None else ():
            plans[f"{label}, batch {batch}"] = (batch, {**sizes, **given, str(batch_name): batch})
    label_of = {f"{label}, batch {b}": label for label in subject.timed or ("",) for b in batches}
    cases = make_cases(
        subject.module,
        example,
        shapes,
        bounds=read_bounds(session.get_modelmeta().custom_metadata_map),
        random_cases=0,
        seed=seed,
        make_inputs=subject.make_inputs,
        plans={name: plan for name, (_, plan) in plans.items()},
    )
    rows = []
    for index, case in enumerate(cases):
        if index == 0 and plans:  # the example itself, unless its sizes are fixed
            continue
        batch = plans[case.name][0] if plans else example.tensors[0].shape[0]
        what = " ".join(filter(None, (subject.path.name, label_of.get(case.name))))
        feeds = {n: t.numpy() for n, t in zip(names, case.inputs.tensors, strict=True)}
        rows.append((what, batch, case, {**fixed, **feeds}))
    return rows


def _torch_call(module: nn.Module, case: Case) -> Callable[[], None]:
    reference = evaluation_copy(module)

    def call() -> None:
        with torch.inference_mode():
            reference(*case.inputs.args, **case.inputs.kwargs)

    return call


def _runtime_call(
    runtime: Runtime, path: Path, feeds: Mapping[str, Any]
) -> Callable[[], float | None]:
    outputs = [value.name for value in open_session(path)[0].get_outputs()]

    def call() -> float | None:
        runtime.run(outputs, feeds)
        return runtime.seconds

    return call
