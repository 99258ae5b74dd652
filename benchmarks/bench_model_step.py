"""A whole training step of a transformer: ours and PEFT's against the frozen base model.

Adapters on every linear layer; the step is forward, backward and AdamW. The base model
has nothing to train: its step is forward, and backward to the embeddings, which any adapter
needs too. "grouped" is ours where query, key and value, and gate and up, are computed together,
"recomputed" is that with inputs of layers computed again for backward (recompute_inputs).
Times are measured side by side in one process, memory in a fresh process each.

    python benchmarks/bench_model_step.py [--quick] [--model minilm] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from goals import Goal, render_goals
from measure import interleaved, machine
from options import JsonFile, Threads
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gauge_ext
from gauge_ext.models import group_shared_inputs, recompute_inputs

NAMES = ("frozen base", "gauge_ext", "grouped", "recomputed", "PEFT")
BASE, OURS, GROUPED, RECOMPUTED, PEFT = NAMES
MODELS = ("minilm", "llama")
RANK, ALPHA = 8, 16


def build(model: str, quick: bool) -> nn.Module:
    """Return the bare model: the shape of all-MiniLM-L6-v2, or of a Llama of 135M parameters."""
    torch.manual_seed(0)
    if model == "minilm":
        bert = transformers.BertConfig(
            hidden_size=384,
            num_hidden_layers=2 if quick else 6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(bert, add_pooling_layer=False)
    llama = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    # The head over 49,152 words would outweigh the layers that carry adapters.
    return transformers.LlamaModel(llama)


def adapted(name: str, model: nn.Module, dropout: float) -> nn.Module:
    """Return the model as ``name`` trains it."""
    if name in (OURS, GROUPED, RECOMPUTED):
        config = gauge_ext.LoRAConfig(rank=RANK, alpha=ALPHA, dropout=dropout)
        gauge_ext.attach(model, config)
        if name != OURS:
            group_shared_inputs(model, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
        if name == RECOMPUTED:
            recompute_inputs(model)
        return model
    if name == PEFT:
        import peft  # here, as it takes seconds that the other processes do not need

        peft_config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear"
        )
        return peft.get_peft_model(model, peft_config)
    return model.requires_grad_(False)


def stepper(name: str, model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """Return one training step of ``model`` as a function."""
    model.train()
    embedding = model.get_input_embeddings()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step() -> None:
        # In every model the embeddings ask for gradients, as they do under gradient checkpointing,
        # so that all of them run backward through the same layers.
        embedded = embedding(tokens).detach().requires_grad_()
        hidden = model(inputs_embeds=embedded).last_hidden_state
        hidden.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    assert (name == BASE) == (optimizer is None)
    return step


def kept_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Return the bytes that a forward pass leaves allocated for its backward pass."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    # What hooks on saved tensors are shown is not all: where they are, inputs are not recomputed.
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as found:
        hidden = model(inputs_embeds=embedded).last_hidden_state
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in found.function_events or ())


def peak_growth(
    name: str, model: str, quick: bool, dropout: float, shape: tuple[int, int], threads: int
) -> int:
    """Return how far three steps raise the peak memory of this process, in bytes."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    tokens = torch.randint(1000, shape, generator=torch.Generator().manual_seed(1))
    step = stepper(name, adapted(name, build(model, quick), dropout), tokens)
    # A new program starts with its parent's peak on its account; 5 sets it to what is resident.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return VmRSS, the memory resident now, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(
    model: str, quick: bool, dropout: float, shape: tuple[int, int], threads: int, rounds: int
) -> dict[str, Any]:
    """Return the figures of one model at one dropout."""
    tokens = torch.randint(1000, shape, generator=torch.Generator().manual_seed(1))
    names = [name for name in NAMES if name != GROUPED or not quick]
    found = {name: adapted(name, build(model, quick), dropout) for name in names}
    steps = {name: stepper(name, found[name], tokens) for name in names}
    timings = interleaved(steps, BASE, rounds=rounds)
    saved = {name: kept_bytes(found[name], tokens) for name in names}
    del found, steps
    # Memory is the same beside others: what takes long in each process is what it imports.
    workers = min(len(names), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        tasks = [(name, model, quick, dropout, shape, threads) for name in names]
        peak = dict(zip(names, pool.starmap(peak_growth, tasks, chunksize=1), strict=True))
    rounds_apart = zip(timings[PEFT].seconds, timings[OURS].seconds, strict=True)
    return {
        "model": model,
        "dropout": dropout,
        "base_ms": timings[BASE].median * 1e3,
        "ratio": {name: timings[name].ratio for name in names[1:]},
        "speedup_over_peft": statistics.median(peft / ours for peft, ours in rounds_apart),
        "saved_bytes": saved,
        "peak_growth_bytes": peak,
    }


def render(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line a model and dropout."""
    table = Table(title="training step over the frozen base model's", title_justify="left")
    names = list(rows[0]["saved_bytes"])
    for column in ("model", "dropout", "base ms", *names[1:], "PEFT / ours"):
        table.add_column(column, justify="right")
    table.add_column("MiB saved: in this order", justify="right")
    table.add_column("MiB peak growth", justify="right")
    for row in rows:
        mebibytes = [
            "/".join(f"{row[key][name] / 2**20:.0f}" for name in names)
            for key in ("saved_bytes", "peak_growth_bytes")
        ]
        table.add_row(
            row["model"],
            f"{row['dropout']}",
            f"{row['base_ms']:.0f}",
            *(f"{row['ratio'][name]:.3f}" for name in names[1:]),
            f"{row['speedup_over_peft']:.2f}",
            *mebibytes,
        )
    console.print(table)


# Of the step's time over the frozen base model's; of memory beyond the base's, over PEFT's.
STEP_LIMITS = {"minilm": ("9", 1.07), "llama": ("10", 1.06)}
MEMORY_LIMITS = (
    ("11  added saved bytes / PEFT's", "saved_bytes", OURS, 0.27),
    ("11  added saved bytes / PEFT's", "saved_bytes", RECOMPUTED, 0.05),
    ("12  added peak memory / PEFT's", "peak_growth_bytes", OURS, 0.11),
    ("12  added peak memory / PEFT's", "peak_growth_bytes", RECOMPUTED, 0.11),
)
PEFT_LIMIT = 2.2


def goals_of(rows: list[dict[str, Any]], threads: int) -> list[Goal]:
    """Return the goals that these figures are measured by: those with dropout on."""
    goals = []
    for row in (row for row in rows if row["dropout"] > 0):
        name, dropout = row["model"], row["dropout"]
        number, limit = STEP_LIMITS[name]
        if threads == 1:
            step = f"{number}  {name} step, p = {dropout}, one thread"
            goals.append(Goal(step, row["ratio"][OURS], limit))
        elif name == "minilm":
            faster = f"9  {name} step, p = {dropout}, {threads} threads: PEFT / ours"
            goals.append(Goal(faster, row["speedup_over_peft"], PEFT_LIMIT, at_least=True))
        for title, key, who, most in MEMORY_LIMITS:
            base, ours, theirs = (row[key][one] for one in (BASE, who, PEFT))
            title = f"{title}, {name}{', recomputed' if who == RECOMPUTED else ''}"
            goals.append(Goal(title, (ours - base) / max(theirs - base, 1), most))
    return goals


def main(
    quick: Annotated[
        bool, typer.Option(help="Fewer layers and rounds, without grouped, dropout on.")
    ] = False,
    model: Annotated[list[str] | None, typer.Option(help="minilm, llama; repeatable.")] = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 8,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.")] = 7,
    json_path: JsonFile = None,
) -> None:
    """Measure whole training steps against the frozen base model and PEFT."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    console = Console(width=max(110, Console().width))
    facts = {**machine(), "peft": version("peft"), "transformers": transformers.__version__}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = []
    for name in model or MODELS:
        some = 0.05 if name == "llama" else 0.1
        for dropout in (some,) if quick else (0.0, some):
            with console.status(f"{name}, dropout {dropout}"):
                shape = (batch, sequence)
                rows.append(measure(name, quick, dropout, shape, threads, 3 if quick else rounds))
    render(rows, console)
    goals = goals_of(rows, threads)
    render_goals(goals, console)
    if json_path is not None:
        found = [goal.as_dict() for goal in goals]
        json_path.write_text(json.dumps({"machine": facts, "rows": rows, "goals": found}, indent=1))
        console.print(f"Figures written to {json_path}")


if __name__ == "__main__":
    typer.run(main)
