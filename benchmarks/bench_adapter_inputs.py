"""An adapter as inputs of a graph against the same adapter merged: latency, loading, switching.

    python benchmarks/bench_adapter_inputs.py [--quick] [--json FILE] [--model bert|llama]

Both graphs run in onnxruntime on one thread, turn by turn in one process; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnxruntime
import torch
from measure import interleaved, machine
from torch import nn

import gauge_ext
from gauge_ext.export import AdapterSession, export_onnx, write_onnx_adapter

AXES = {0: "batch", 1: "sequence"}
# Calls of one session follow each other, as where a model is served: its weights are in the cache.
SLICE = 0.1
SIZES = ((1, 1), (1, 16), (1, 128), (8, 128))


def make_model(kind: str, quick: bool) -> nn.Module:
    """A BERT of MiniLM's sizes, or a Llama of 135M parameters' sizes; random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=4000,
            hidden_size=384,
            num_hidden_layers=3 if quick else 6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        return transformers.BertModel(config, add_pooling_layer=False).eval()
    config = transformers.LlamaConfig(
        vocab_size=4000,
        hidden_size=576,
        num_hidden_layers=3 if quick else 8,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        use_cache=False,
    )
    return transformers.LlamaModel(config).eval()


def export(model: nn.Module, folder: Path, rank: int) -> tuple[Path, Path, Path]:
    """The merged graph, the graph with inputs, and the adapter's file."""
    targets = "all-linear"
    gauge_ext.attach(model, gauge_ext.LoRAConfig(rank=rank, alpha=rank, target_modules=targets))
    with torch.no_grad():
        for _, parameter in gauge_ext.named_adapter_parameters(model):
            parameter.normal_(std=0.02)
    gauge_ext.save_adapter(model, folder / "adapter")
    ids = torch.randint(4000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = dict.fromkeys(inputs, AXES)
    paths = folder / "merged.onnx", folder / "inputs.onnx"
    for path, mode in zip(paths, ("merged", "adapters"), strict=True):
        export_onnx(model, inputs, path, dynamic_shapes=shapes, mode=mode, validate=False)
    file = folder / "a.onnx_adapter"
    write_onnx_adapter(model, paths[1], file)
    return *paths, file


def measure(model: nn.Module, rank: int, rounds: int) -> dict[str, Any]:
    """Latencies by size of the batch, and the times of loading and switching."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"rank": rank, "latency": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged_path, graph_path, adapter = export(model, folder, rank)
        merged = onnxruntime.InferenceSession(str(merged_path), options)
        session = AdapterSession(graph_path, {"a": adapter}, session_options=options)
        session.add("b", folder / "adapter")
        turns = itertools.cycle("ab")
        for batch, sequence in SIZES:
            feeds = {
                "input_ids": rng.integers(0, 4000, (batch, sequence)),
                "attention_mask": np.ones((batch, sequence), np.int64),
            }
            one, two = merged.run(None, feeds)[0], session.run(feeds, "a")
            timings = interleaved(
                {
                    "merged": lambda feeds=feeds: merged.run(None, feeds),
                    "adapter": lambda feeds=feeds: session.run(feeds, "a"),
                    "switching": lambda feeds=feeds: session.run(feeds, next(turns)),
                    "no adapter": lambda feeds=feeds: session.run(feeds),
                },
                "merged",
                rounds=rounds,
                slice_seconds=SLICE,
            )
            found["latency"].append(
                {
                    "batch": batch,
                    "sequence": sequence,
                    "merged_ms": timings["merged"].median * 1e3,
                    "ratio": {key: timing.ratio for key, timing in timings.items()},
                    "ratio_of_least": {
                        key: min(timing.seconds) / min(timings["merged"].seconds)
                        for key, timing in timings.items()
                    },
                    "max_abs": float(np.abs(one - next(iter(two.values()))).max()),
                }
            )
        found["load_ms"] = _load_times(session, adapter, folder / "adapter")
        found["adapter_mib"] = adapter.stat().st_size / 2**20
    return found


def _load_times(session: AdapterSession, file: Path, folder: Path) -> dict[str, float]:
    times: dict[str, list[float]] = {"onnx_adapter": [], "PEFT folder": []}
    for _ in range(7):
        for key, source in (("onnx_adapter", file), ("PEFT folder", folder)):
            start = time.perf_counter()
            session.add("loaded", source)
            times[key].append((time.perf_counter() - start) * 1e3)
            session.remove("loaded")
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    """Measure as the command line says, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half the layers, fewer rounds")
    parser.add_argument("--model", choices=["bert", "llama"], default="bert")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(make_model(args.model, args.quick), args.rank, 11 if args.quick else 31)
    found = {"model": args.model, "machine": machine(), **found}
    print(f"{args.model}, rank {args.rank}, every linear layer, one thread; ratios to merged")
    print("batch x tokens   merged ms   adapter   switching   no adapter   max abs")
    for row in found["latency"]:
        ratio = row["ratio"]
        print(
            f"{row['batch']:>5} x {row['sequence']:<6} {row['merged_ms']:>12.2f} "
            f"{ratio['adapter']:>9.3f} {ratio['switching']:>11.3f} {ratio['no adapter']:>12.3f} "
            f"{row['max_abs']:>9.1e}"
        )
    loads = ", ".join(f"{key} {value:.2f} ms" for key, value in found["load_ms"].items())
    print(f"loading {found['adapter_mib']:.2f} MiB: {loads}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
