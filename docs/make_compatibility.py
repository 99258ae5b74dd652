"""Writes docs/compatibility.md: every feature of PEFT's LoRA, run with PEFT and with ours.

    python docs/make_compatibility.py            writes the table
    python docs/make_compatibility.py --print    prints it

Each row builds a small model, of float64 where it can be, lets PEFT save a random adapter, reads it
here, and compares both outputs with W + s B A summed by hand; then it saves the adapter here and
compares every key and every bit of the file, and lets PEFT read it. The rows are those of the
conformance test. A difference within rounding is not told by its digits, which another machine
would not repeat.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft  # noqa: TID253 - a script, which compares with it
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "checkpoint"))

from peft_rows import ROWS  # noqa: E402 - in the folder just named
from row_by_hand import Row, run  # noqa: E402 - there too

from gauge_ext import load_adapter, save_adapter, set_adapters  # noqa: E402 - behind it
from gauge_ext.errors import AdapterStateError, ConfigError  # noqa: E402 - behind it

TARGET = ROOT / "docs" / "compatibility.md"
HEAD = """# Compatibility with PEFT {version}

Made by `python docs/make_compatibility.py`, which runs every row in float64, those on quantized
weights in float32; do not edit by hand.
The reference is the update summed by hand, not PEFT. "difference" is the largest of any output;
what is below the bound shown is rounding.
"written alike": every key and every bit of the file that PEFT wrote comes out again.

| feature | ours: difference | PEFT: difference | read | written alike | PEFT reads ours |
|---|---|---|---|---|---|
"""
TWO_HEAD = """
## Two adapters on one model

A second adapter of PEFT's beside the first, of twice the alpha: alone, then both with the weights 1
and -0.5, held against the weights summed by hand; and each sample of a batch with an adapter of its
own (`adapter_names=` in both libraries), held against each adapter alone.

| feature | ours: second alone | ours: both | ours: by samples | PEFT: by samples |
|---|---|---|---|---|
"""
NOTES = """
Where PEFT's difference is not rounding:

"""


def shown(row: Row, difference: float) -> str:
    """Returns a difference as the page tells it."""
    return f"< {row.tolerance:.0e}" if difference < row.tolerance else f"{difference:.0e}"


def row_of(row: Row) -> tuple[str, str | None]:
    """Runs a row; returns its line and, where PEFT is off, a note."""
    torch.manual_seed(2)
    theirs = peft.get_peft_model(row.base(), peft.LoraConfig(**copy.deepcopy(row.fields))).eval()
    with torch.no_grad():
        for _, parameter in sorted(theirs.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    inputs = row.inputs()
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "theirs"), Path(folder, "ours")
        theirs.save_pretrained(first)
        tensors = safetensors.torch.load_file(first / "adapter_model.safetensors")
        expected = run(row.expected(row.base(), tensors), inputs)
        ours = load_adapter(row.base(), first)
        difference = float((run(ours, inputs) - expected).abs().max())
        try:
            theirs_difference = shown(row, float((run(theirs, inputs) - expected).abs().max()))
        except RuntimeError:
            theirs_difference = "fails"
        save_adapter(ours, second)
        again = safetensors.torch.load_file(second / "adapter_model.safetensors")
        same = again.keys() == tensors.keys() and all(
            torch.equal(again[key], tensors[key]) for key in tensors
        )
        back = peft.PeftModel.from_pretrained(row.base(), second).eval()
        state = {
            k: v for k, v in theirs.state_dict().items() if "lora_" in k or "trainable_tokens" in k
        }
        reads = all(torch.equal(back.state_dict()[key], state[key]) for key in state)
    cells = [
        row.name,
        shown(row, difference),
        theirs_difference,
        "yes" if difference < row.tolerance else "NO",
        "yes" if same else "NO",
        "yes" if reads else "NO",
    ]
    return f"| {' | '.join(cells)} |", f"- {row.name}: {row.peft_is}." if row.peft_is else None


def two_of(row: Row) -> str:
    """Runs a row with two adapters; returns its line."""
    torch.manual_seed(3)
    fields = copy.deepcopy(row.fields)
    second = {**fields, "lora_alpha": 2 * fields.get("lora_alpha", 8)}
    second |= {"alpha_pattern": {k: 2 * v for k, v in fields.get("alpha_pattern", {}).items()}}
    sums, inputs = {}, row.inputs()
    with tempfile.TemporaryDirectory() as folder:
        for name, given, factor in (("first", fields, 1), ("second", second, 2)):
            theirs = peft.get_peft_model(row.base(), peft.LoraConfig(**copy.deepcopy(given)))
            with torch.no_grad():
                for _, parameter in sorted(theirs.named_parameters()):
                    if parameter.requires_grad:
                        parameter.normal_(std=0.4)
            theirs.save_pretrained(Path(folder, name))
            tensors = safetensors.torch.load_file(Path(folder, name) / "adapter_model.safetensors")
            scaled = dataclasses.replace(row, scaling=row.scaling * factor)
            sums[name] = scaled.expected(row.base(), tensors)
        ours = load_adapter(row.base(), Path(folder, "first"), name="first")
        try:
            load_adapter(ours, Path(folder, "second"), name="second")
        except ConfigError:
            return f"| {row.name} | refused | refused | refused | |"
        theirs = peft.PeftModel.from_pretrained(row.base(), Path(folder, "first"), "first")
        try:
            theirs.load_adapter(Path(folder, "second"), "second")
        except ValueError:  # a second one on parameters
            theirs = None
    # The base in the layout of the sums, without groups or codes. A DoRA of zeros would be none,
    # and rows of zeros not the base's.
    zeros = {key: 0 * value for key, value in tensors.items()}
    valued = any("magnitude" in key or "trainable_tokens" in key for key in tensors)
    base = row.base() if valued else row.expected(row.base(), zeros)
    both = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            own = parameter.clone()
            for of, number in (("first", 1.0), ("second", -0.5)):
                parameter += number * (sums[of].get_parameter(name) - own)
    set_adapters(ours, "second")
    alone = float((run(ours, inputs) - run(sums["second"], inputs)).abs().max())
    try:
        set_adapters(ours, {"first": 1.0, "second": -0.5})
        summed = shown(row, float((run(ours, inputs) - run(both, inputs)).abs().max()))
    except AdapterStateError:  # each with a module of its own
        summed = "refused"
    rows = [("second", "__base__", "first")[i % 3] for i in range(len(inputs[0]))]
    outputs = {name: run(model, inputs) for name, model in sums.items()}
    outputs["__base__"] = run(row.base(), inputs)
    expected = torch.stack([outputs[name][i] for i, name in enumerate(rows)])

    def mixed(model: torch.nn.Module | None) -> str:
        if model is None:
            return "refused"
        try:
            found = run_by_names(model.eval(), inputs, rows)
        except (ValueError, TypeError, AdapterStateError):
            return "refused"
        except (RuntimeError, KeyError):  # a tied module that PEFT does not give the second
            return "fails"
        return shown(row, float((found - expected).abs().max()))

    cells = [row.name, shown(row, alone), summed, mixed(ours), mixed(theirs)]
    return f"| {' | '.join(cells)} |"


def run_by_names(model: torch.nn.Module, inputs: tuple[Any, ...], names: list[str]) -> torch.Tensor:
    """The output with an adapter for each sample."""
    return run(functools.partial(model, adapter_names=names), inputs)


def table() -> str:
    """The whole page."""
    warnings.simplefilter("ignore")
    lines, notes = zip(*map(row_of, ROWS), strict=True)
    found = [note for note in notes if note]
    text = HEAD.format(version=peft.__version__) + "\n".join(lines) + "\n"
    text += NOTES + "\n".join(found) + "\n" if found else ""
    return text + TWO_HEAD + "\n".join(map(two_of, ROWS)) + "\n"


def main() -> None:
    """Writes or prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print it and write nothing")
    if parser.parse_args().print:
        sys.stdout.write(table())
    else:
        TARGET.write_text(table(), encoding="utf-8")
        sys.stdout.write(f"{TARGET}\n")


if __name__ == "__main__":
    main()
