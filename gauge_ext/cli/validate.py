"""``gauge-ext validate``: the proof of an export, in one runtime or several, and its page."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gauge_ext.cli import options
from gauge_ext.cli.adapted import (
    Architecture,
    RandomCases,
    check_targets,
    load_adapted,
    load_with_inputs,
    show,
    tolerance_of,
)
from gauge_ext.cli.console import note, working
from gauge_ext.cli.files import write_text
from gauge_ext.cli.problems import OptionError, blame, explains_errors
from gauge_ext.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from gauge_ext.export.proof.perplexity import Perplexity
    from gauge_ext.export.proof.subject import Subject
    from gauge_ext.export.report import ValidationReport


class RuntimeChoice(StrEnum):
    """``gauge_ext.export.proof.runtimes.RUNTIMES``, and all of them that are installed."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    NODE = "onnxruntime-node"
    WEB = "onnxruntime-web"
    BROWSER = "onnxruntime-web-browser"
    ALL = "all"


@explains_errors
def validate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="The ONNX file to check, or the folder of a model that generates.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="BASE",
            help="The base model that it was made from: a local transformers folder, or "
            "module:factory.",
            show_default=False,
        ),
    ],
    adapter: options.AdapterOption = None,
    architecture: Architecture = None,
    batch: options.Batch = None,
    sequence: options.Sequence = None,
    tolerance: options.ToleranceOption = None,
    random_cases: RandomCases = 2,
    runtime: Annotated[
        list[RuntimeChoice] | None,
        typer.Option(
            metavar="RUNTIME",
            help="What runs the file: "
            + ", ".join(RuntimeChoice)
            + ", which is every one that is installed here; may be given several times. Those of "
            "npm need the package in node_modules of this folder or one above it, or of NODE_PATH, "
            "and Node.js or, in the browser, Chromium. Default: onnxruntime.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A text (UTF-8): compare its perplexity. For a text-generation folder with a "
            "tokenizer.",
            show_default=False,
        ),
    ] = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Time torch and each runtime in turns, batches of 1 and of 8."
        ),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(min=0.01, metavar="S", help="With --latency: time for each row of timings."),
    ] = 2.0,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Measure onnxruntime's peak memory in a process of its own."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with plots here; it needs no network.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Compare an ONNX file with the torch model it came from.

    The file runs in onnxruntime (and others), the model in torch with the adapter beside its
    weights. Exits with status 1 when an output differs by more than the tolerance.
    """
    if not file.exists():
        raise OptionError("FILE", f"no such file: {str(file)!r}.", hint="Give an .onnx file.")
    check_targets(report=report_file, html=html)
    runtimes = _runtimes(runtime or [RuntimeChoice.ONNXRUNTIME])
    words = _read_text(file, text)
    wholes: list[Callable[[], ValidationReport]] = []
    perplexity: Callable[[], Perplexity] | None = None
    subjects: list[Subject]
    if file.is_dir():
        for option, size in (("--batch", batch), ("--sequence", sequence)):
            if size is not None:
                raise OptionError(
                    option, "it is for single files, and FILE is a folder.", hint="Leave it out."
                )
        model = load_adapted(against, adapter, architecture, "--against").model
        with blame("FILE"):
            subjects, wholes = _generating(file, model, tolerance_of(tolerance), seed)
        if words is not None:
            perplexity = _perplexity(file, model, words)
    else:
        model, inputs, _ = load_with_inputs(
            against, adapter, architecture, batch, sequence, seed, "--against"
        )
        from gauge_ext.export.proof.subject import Subject

        subjects = [Subject(file, model, inputs, random_cases=random_cases)]
    from gauge_ext.export.proof.prove import prove

    with working("validating") as progress, blame("FILE"):
        proof = prove(
            file,
            subjects,
            wholes=wholes,
            runtimes=runtimes,
            tolerance=tolerance_of(tolerance),
            seed=seed,
            latency=seconds if latency else 0.0,
            memory=memory,
            perplexity=perplexity,
            progress=progress,
        )
    if html is not None:
        write_text(html, proof.to_html(), "--html")
    show(proof, report_file, as_json)
    if not proof.passed:
        cases = [case.passed for report in proof.validations for case in report.cases]
        raise OptionError(
            "--tolerance",
            f"{str(file)!r} disagrees with torch in {cases.count(False)} of {len(cases)} cases"
            + (" and in perplexity." if all(cases) else "."),
            hint="Export it again from this base and adapter, or allow a larger difference.",
        )


def _runtimes(chosen: list[RuntimeChoice]) -> list[str]:
    """The runtimes by name, each once; refused where one that was named is not there."""
    from gauge_ext.export.proof.runtimes import RUNTIMES, missing

    names = list(dict.fromkeys(choice.value for choice in chosen))
    if "all" in names:
        absent = {name: why for name in RUNTIMES if (why := missing(name)) is not None}
        for name, why in absent.items():
            note(f"left out: {name}, {why}")
        return [name for name in RUNTIMES if name not in absent]
    for name in names:
        if (why := missing(name)) is not None:
            raise OptionError(
                "--runtime", f"{name} cannot be used: {why}.", hint="Install it, or leave it out."
            )
    return names


def _read_text(file: Path, text: Path | None) -> str | None:
    if text is None:
        return None
    if not (file / "model.onnx").is_file():
        raise OptionError(
            "--text",
            "perplexity is for the folder of a text-generation model.",
            hint="Give such a folder as FILE, or leave --text out.",
        )
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("--text", f"{str(text)!r} cannot be read: {error}.") from error


def _generating(
    folder: Path, model: nn.Module, tolerance: Any, seed: int
) -> tuple[list[Subject], list[Callable[[], ValidationReport]]]:
    """The graphs of a folder, and the comparison of their loop."""
    from gauge_ext.export.language.causal_lm import causal_kind
    from gauge_ext.export.language.graphs import CAUSAL, ENCODER
    from gauge_ext.export.language.seq2seq import seq2seq_kind

    for name, kind_of in ((ENCODER, seq2seq_kind), (CAUSAL, causal_kind)):
        if (folder / name).is_file():
            kind = kind_of(model)
            whole = partial(kind.whole, folder, tolerance, seed)
            return list(kind.subjects(folder, seed)), [whole]
    raise ConfigError(
        f"{str(folder)!r} has neither model.onnx nor encoder_model.onnx.",
        hint="Give an .onnx file, or a folder that gauge-ext export wrote.",
    )


def _perplexity(folder: Path, model: nn.Module, words: str) -> Callable[[], Perplexity]:
    from gauge_ext.export.proof.perplexity import text_perplexity

    def compute() -> Perplexity:
        with blame("--text"):
            return text_perplexity(folder, model, words)

    return compute
