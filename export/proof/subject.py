"""What is proven: one graph and the torch module that it has to equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gauge_ext.export.adapters.file import find_table
from gauge_ext.export.adapters.validate import validate_adapters
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import MakeInputs
from gauge_ext.export.validate import Focus, Progress, Runtime, validate_onnx


@dataclass(frozen=True)
class Subject:
    """One graph, its torch module, and how to make inputs of both.

    Attributes:
        path: The ONNX file.
        module: What it was made from, adapters beside the weights or merged.
        example: What the module is called with.
        make_inputs: See :func:`gauge_ext.export.trace.cases.make_cases`.
        cases: See :func:`gauge_ext.export.validate_onnx`.
        focus: See :func:`gauge_ext.export.validate_onnx`.
        random_cases: How many cases of random sizes, where ``cases`` does not say which.
        timed: Name -> sizes of what is worth timing, without the batch size; empty: the example.
    """

    path: Path
    module: nn.Module
    example: tuple[Any, ...] | Mapping[str, Any]
    make_inputs: MakeInputs | None = None
    cases: Mapping[str, Mapping[str, int]] | None = None
    focus: Focus | None = None
    random_cases: int = 2
    timed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def validate(
        self,
        *,
        tolerance: Tolerance | None = None,
        seed: int = 0,
        runtime: Runtime | None = None,
        progress: Progress | None = None,
    ) -> ValidationReport:
        """Compares the two, in onnxruntime or in another runtime.

        A graph with inputs for adapters is run without an adapter and, where the module has one,
        with it.
        """
        check = validate_onnx if find_table(self.path) is None else validate_adapters
        return check(
            self.path,
            self.module,
            self.example,
            tolerance=tolerance,
            random_cases=self.random_cases,
            seed=seed,
            make_inputs=self.make_inputs,
            cases=self.cases,
            focus=self.focus,
            runtime=runtime,
            progress=progress,
        )
