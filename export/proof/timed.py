"""What is timed: inputs of several sizes for both sides, and a call of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gauge_ext.export.metadata import read_bounds
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.session import open_session
from gauge_ext.export.trace.cases import Case, make_cases
from gauge_ext.export.trace.inputs import bind_inputs
from gauge_ext.export.validate import Runtime, evaluation_copy, fixed_feeds, match_inputs


def timed_cases(
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


def torch_call(module: nn.Module, case: Case) -> Callable[[], None]:
    """A call of the torch module with the inputs of a case."""
    reference = evaluation_copy(module)

    def call() -> None:
        with torch.inference_mode():
            reference(*case.inputs.args, **case.inputs.kwargs)

    return call


def runtime_call(
    runtime: Runtime, path: Path, feeds: Mapping[str, Any]
) -> Callable[[], float | None]:
    """A call of a graph; it returns the seconds by the runtime's own clock, where it has one."""
    outputs = [value.name for value in open_session(path)[0].get_outputs()]

    def call() -> float | None:
        runtime.run(outputs, feeds)
        return runtime.seconds

    return call
