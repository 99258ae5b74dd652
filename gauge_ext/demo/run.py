"""The whole way in one function: data, training, adapter, ONNX file, search."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint import save_adapter
from gauge_ext.demo.corpus import Pair, Split, split_pairs, stdlib_pairs, words_of
from gauge_ext.demo.encoder import BASE_NAME, SentenceEncoder, load_encoder, model_folder
from gauge_ext.demo.latency import Latency, interleaved
from gauge_ext.demo.metrics import Retrieval, retrieval
from gauge_ext.demo.progress import Clock, progress_bar
from gauge_ext.demo.result import (
    DemoResult,
    Score,
)
from gauge_ext.demo.search import NameIndex, OnnxEncoder
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.demo.threads import useful_threads
from gauge_ext.demo.train import Step, TrainConfig, train
from gauge_ext.models import adapter_parameters, attach, lora_layers, merge

if TYPE_CHECKING:
    from rich.console import Console

    from gauge_ext.export import ExportReport

HELD_OUT = 500
TOKENIZER = "tokenizer.json"
QUERIES = (
    "remove a folder with everything in it",
    "wait until a thread has finished",
    "find the most frequent elements of a list",
)
# The pooler is left out by name: this model does without it, but the plain one has it, and its
# "dense" would be meant too.
ADAPTER = LoRAConfig(
    rank=8,
    alpha=16,
    dropout=0.05,
    target_modules=["query", "key", "value", "dense"],
    exclude_modules=["pooler.dense"],
    task_type="FEATURE_EXTRACTION",
    base_model_name_or_path=BASE_NAME,
)


def run_demo(
    out: Path,
    epochs: int = 2,
    seed: int = 0,
    console: Console | None = None,
    *,
    pairs: Sequence[Pair] | None = None,
    held_out: int = HELD_OUT,
    training: TrainConfig | None = None,
) -> DemoResult:
    """Trains, measures, exports and uses an adapter of all-MiniLM-L6-v2, and prints what it finds.

    Args:
        out: Folder for everything that is made; it is made if need be, and what an earlier run
            left there is replaced.
        epochs: Passes over the training pairs.
        seed: Seed of split, initialisation, dropout and order.
        console: Where to print; default: standard output.
        pairs: The data; default: the standard library's.
        held_out: How many of the pairs are kept for the scores.
        training: How to train; ``epochs`` and ``seed`` come from the arguments above.

    Returns:
        Everything that was measured, and where it lies.

    Raises:
        GaugeError: A package of the extra ``demo`` is missing, or there is nothing to learn from.
        ConfigError: An argument cannot be used.
        WriteError: ``out`` cannot be written; found out before anything else is done.
        ValidationError: onnxruntime and torch disagree.
    """
    from rich.console import Console as RichConsole

    from gauge_ext.export.checks import require_packages

    console = RichConsole() if console is None else console
    settings = dataclasses.replace(training or TrainConfig(), epochs=epochs, seed=seed)
    require_packages()
    folder = model_folder()
    tokenizer = TextTokenizer(folder / TOKENIZER)
    _require_writable(out)
    clock = Clock()

    with clock.step("read"), console.status("reading the standard library's docstrings"):
        found = stdlib_pairs() if pairs is None else list(pairs)
        split = split_pairs(found, held_out, seed)
        encoder = load_encoder(folder)
    console.print(
        f"{len(found):,} documented names: {len(split.train):,} to learn from, "
        f"{len(split.held_out):,} held out."
    )
    names = [pair.name for pair in found]
    with useful_threads(partial(_sample, encoder, tokenizer, split)) as threads:
        with clock.step("measure"):
            before = _measure("before", encoder, tokenizer, split, console)
        with clock.step("train"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attach(encoder.bert, ADAPTER)
            _say_attached(encoder, threads, console)
            losses = _train(encoder, tokenizer, split, settings, console)
        with clock.step("measure"):
            after = _measure("after", encoder, tokenizer, split, console)
    with clock.step("export"):
        adapter = save_adapter(encoder.bert, out / "adapter")
        exported = _export(encoder, tokenizer, out / "model.onnx", console)
        shipped = out / TOKENIZER
        _write(shipped, (folder / TOKENIZER).read_bytes())
    with clock.step("latency"), console.status("timing onnxruntime against torch"):
        latencies = _latencies(encoder, exported.path, tokenizer, split.held_out)
    del encoder  # from here on the files alone speak
    with clock.step("search"):
        index, alone = _measure_files(exported.path, shipped, split, names, console)
        answers = {query: index.search(query) for query in QUERIES}

    result = DemoResult(
        seed=seed,
        epochs=epochs,
        train_pairs=len(split.train),
        held_out_pairs=len(split.held_out),
        losses=losses,
        scores=[before, after, alone],
        latencies=latencies,
        answers=answers,
        export=exported,
        adapter=adapter,
        onnx=exported.path,
        tokenizer=shipped,
        report=out / "report.json",
        seconds=clock.seconds,
    )
    _write(result.report, json.dumps(result.to_dict(), indent=2, allow_nan=False).encode())
    result.render(console)
    return result


def _train(
    encoder: SentenceEncoder,
    tokenizer: TextTokenizer,
    split: Split,
    settings: TrainConfig,
    console: Console,
) -> list[float]:
    with progress_bar(console, "training", "steps") as update:

        def on_step(step: Step) -> None:
            update(
                step.number,
                step.total,
                f"loss {step.loss:.3f}  rate {step.rate:.1e}  {step.pairs_per_second:.0f} pairs/s",
            )

        losses = train(encoder, tokenizer, split.train, settings, on_step)
    tail = losses[-10:]
    console.print(
        f"trained {len(losses)} steps: loss {losses[0]:.3f} at first, {sum(tail) / len(tail):.3f} "
        f"over the last {len(tail)}."
    )
    return losses


def _measure(
    stage: str,
    encoder: SentenceEncoder,
    tokenizer: TextTokenizer,
    split: Split,
    console: Console,
) -> Score:
    with progress_bar(console, f"measuring {stage}", "names") as update, torch.inference_mode():
        queries = encoder.encode(tokenizer, [pair.sentence for pair in split.held_out])
        names = [words_of(pair.name) for pair in split.held_out]
        vectors = encoder.encode(tokenizer, names, update)
    return Score(stage, _held_out(stage, queries, vectors, console))


def _measure_files(
    model: Path, tokenizer: Path, split: Split, names: Sequence[str], console: Console
) -> tuple[NameIndex, Score]:
    """Measures by what lies in ``out``, without a torch model, and among all names as well."""
    encoder = OnnxEncoder(model, TextTokenizer(tokenizer))
    with progress_bar(console, "indexing with onnxruntime", "names") as update:
        index = NameIndex(encoder, names, update)
    queries = encoder.encode([pair.sentence for pair in split.held_out])
    vectors, texts = torch.from_numpy(index.vectors), torch.from_numpy(queries)
    row = {name: i for i, name in enumerate(names)}
    answers = torch.tensor([row[pair.name] for pair in split.held_out])
    stage = "the ONNX file alone"
    held_out = _held_out(stage, texts, vectors[answers], console)
    return index, Score(stage, held_out, library=retrieval(texts, vectors, answers))


def _held_out(stage: str, queries: Tensor, vectors: Tensor, console: Console) -> Retrieval:
    """Scores queries whose answers are the vectors in the same order, and says so."""
    found = retrieval(queries, vectors, torch.arange(len(queries)))
    console.print(
        f"{stage}: recall@1 {found.recall_at_1:.3f}, MRR {found.mrr:.3f} among the "
        f"{len(queries):,} held-out names."
    )
    return found


def _export(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, path: Path, console: Console
) -> ExportReport:
    from gauge_ext.export import export_onnx

    (group,) = tokenizer.groups(QUERIES, len(QUERIES))
    example = {
        "input_ids": torch.tensor(group.input_ids),
        "attention_mask": torch.tensor(group.attention_mask),
    }
    with progress_bar(console, "exporting", "") as update:
        report = export_onnx(
            encoder,
            example,
            path,
            dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in example},
            output_names=["embedding"],
            progress=lambda what, share: update(round(100 * share), 100, what),
        )
    report.render(console)
    return report


def _latencies(
    encoder: SentenceEncoder, model: Path, tokenizer: TextTokenizer, pairs: Sequence[Pair]
) -> list[Latency]:
    """Times the merged torch model against the file: one query, and a batch of them.

    One thread each: with more, the waiting threads of one would take the cores from the other.
    """
    merge(encoder, keep_base=False)
    runtime = OnnxEncoder(model, tokenizer, threads=1)
    latencies = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for texts, rounds in (([QUERIES[0]], 40), ([pair.sentence for pair in pairs[:32]], 12)):
            (group,) = tokenizer.groups(texts, len(texts))
            ids, mask = torch.tensor(group.input_ids), torch.tensor(group.attention_mask)
            calls: dict[str, Callable[[], object]] = {
                "torch": partial(encoder, ids, mask),
                "onnxruntime": partial(runtime.run, ids.numpy(), mask.numpy()),
            }
            job = f"{ids.shape[0]} x {ids.shape[1]} tokens"
            with torch.inference_mode():
                latencies.append(interleaved(job, calls, rounds))
    finally:
        torch.set_num_threads(threads)
    return latencies


def _sample(encoder: SentenceEncoder, tokenizer: TextTokenizer, split: Split) -> None:
    """Does a small piece of what measuring and training do."""
    with torch.inference_mode():
        encoder.encode(tokenizer, [pair.sentence for pair in split.train[:32]])


def _say_attached(encoder: SentenceEncoder, threads: int, console: Console) -> None:
    trained = sum(parameter.numel() for parameter in adapter_parameters(encoder))
    total = sum(parameter.numel() for parameter in encoder.parameters())
    console.print(
        f"rank {ADAPTER.rank} adapters on {len(lora_layers(encoder))} layers: {trained:,} of "
        f"{total:,} parameters are trained ({trained / total:.1%}); "
        f"threads used: {threads}."
    )


def _require_writable(out: Path) -> None:
    """Finds out before two minutes of training whether there is a place for the outcome."""
    from gauge_ext.export.disk.files import write_errors

    there = out.absolute()
    while not there.exists():
        there = there.parent
    with write_errors(out), tempfile.TemporaryFile(dir=there):
        pass


def _write(path: Path, content: bytes) -> None:
    from gauge_ext.export.disk.files import staged_files, write_errors

    with staged_files(path) as folder, write_errors(path):
        (folder / path.name).write_bytes(content)
