"""What an export did and what its validation found: dataclasses, JSON, and a rich table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from gauge_ext.export.precision.quantize_report import QuantizationReport


@dataclass(frozen=True)
class OutputDifference:
    """One output of one case, onnxruntime (z) against torch (y).

    Attributes:
        name: The output's name in the graph.
        dtype: torch's dtype, without the ``torch.`` prefix.
        shape: torch's shape.
        max_abs: max|z - y| over the entries that are finite in both.
        relative: max_abs / max|y|; 0 where both are zero.
        cosine: <y, z> / (|y| |z|), None for integers or where y is no more than noise.
        top1: Share of rows with equal argmax; None unless the output holds logits.
        limit: The largest max_abs allowed.
        passed: Whether every part of the tolerance holds.
        reason: Why it failed, None if it passed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    cosine: float | None
    top1: float | None
    limit: float
    passed: bool
    reason: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One set of inputs, run through both.

    Attributes:
        name: ``example``, ``smallest``, ``larger`` or ``random N``.
        sizes: The size of each dynamic dimension in this case.
        outputs: The differences, output by output; empty where onnxruntime refused to run.
        error: What onnxruntime said when it refused, else None.
    """

    name: str
    sizes: dict[str, int]
    outputs: tuple[OutputDifference, ...]
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether onnxruntime ran and every output is within the tolerance."""
        return self.error is None and all(output.passed for output in self.outputs)


@dataclass(frozen=True)
class ValidationReport:
    """The comparison of one ONNX file with one torch model.

    Attributes:
        path: The file that was run.
        runtime: What ran it, name and version.
        cases: Every set of inputs that was tried.
    """

    path: Path
    runtime: str
    cases: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(case.passed for case in self.cases)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each thing that failed: case, sizes, output, reason."""
        lines = []
        for case in self.cases:
            where = f"case {case.name!r}" + (f" ({_sizes(case.sizes)})" if case.sizes else "")
            if case.error is not None:
                lines.append(f"{where}: onnxruntime refused to run: {case.error}")
            lines += [
                f"{where}, output {output.name!r}: {output.reason}"
                for output in case.outputs
                if not output.passed
            ]
        return tuple(lines)

    @property
    def max_abs(self) -> float:
        """The largest absolute difference over all cases and outputs."""
        return max((o.max_abs for case in self.cases for o in case.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON (NaN and infinity become None)."""
        return {
            "path": str(self.path),
            "runtime": self.runtime,
            "passed": self.passed,
            "max_abs": _jsonable(self.max_abs),
            "failures": list(self.failures),
            "cases": [{**_jsonable(asdict(case)), "passed": case.passed} for case in self.cases],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console) -> None:
        """Prints one row for each case and output, and each failure in words."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.path.name} in {self.runtime} against torch")
        table.add_column("case")
        table.add_column("sizes")
        table.add_column("output")
        for heading in ("max abs", "limit", "relative", "1 - cosine", "top-1"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for case in self.cases:
            sizes = _sizes(case.sizes) or "as in the example"
            if case.error is not None:
                row = [Text(case.name), Text(sizes), Text("refused to run"), *[Text("")] * 5]
                table.add_row(*row, Text("FAIL", style="bold red"))
            for output in case.outputs:
                table.add_row(
                    Text(case.name),
                    Text(sizes),
                    Text(output.name),
                    f"{output.max_abs:.1e}",
                    f"{output.limit:.1e}",
                    f"{output.relative:.1e}",
                    "" if output.cosine is None else f"{1 - output.cosine:.1e}",
                    "" if output.top1 is None else f"{output.top1:.1%}",
                    Text("ok", style="green") if output.passed else Text("FAIL", style="bold red"),
                )
        console.print(table)
        for line in self.failures:
            console.print(Text(line, style="red"))


@dataclass(frozen=True)
class ExportReport:
    """What :func:`gauge_ext.export.export_onnx` wrote.

    Attributes:
        path: The ONNX file.
        files: Every file written: ``path``, and the external data if there is any.
        bytes_written: Their sizes, added up.
        opset: The version of the default operator set in the graph.
        inputs: Name -> shape, a dynamic dimension by its name.
        outputs: Name -> shape, a dynamic dimension by its name.
        parameters: Initializer -> the names that the model gives this parameter (several if tied).
        provenance: The metadata written into the file.
        seconds: Step -> wall time.
        validation: What validation found; None if it was switched off.
        adapter_inputs: Name -> shape of the inputs for adapters; empty where they are merged.
        quantization: What fewer bits cost; None in float32.
    """

    path: Path
    files: tuple[Path, ...]
    bytes_written: int
    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    parameters: dict[str, tuple[str, ...]]
    provenance: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    validation: ValidationReport | None = None
    adapter_inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    quantization: QuantizationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "bytes_written": self.bytes_written,
            "opset": self.opset,
            "inputs": _jsonable(self.inputs),
            "outputs": _jsonable(self.outputs),
            "adapter_inputs": _jsonable(self.adapter_inputs),
            "parameters": _jsonable(self.parameters),
            "provenance": dict(self.provenance),
            "seconds": {step: round(value, 3) for step, value in self.seconds.items()},
            "validation": None if self.validation is None else self.validation.to_dict(),
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console) -> None:
        """Prints the files, the graph's face, the provenance, and the validation's table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, title="ONNX export")
        table.add_column(style="bold")
        table.add_column()
        for file in self.files:
            table.add_row("file", Text(str(file)))
        table.add_row("size", f"{self.bytes_written / 2**20:.1f} MiB")
        table.add_row("opset", str(self.opset))
        table.add_row("inputs", Text(_signature(self.inputs)))
        table.add_row("outputs", Text(_signature(self.outputs)))
        if self.adapter_inputs:
            table.add_row("adapter inputs", f"{len(self.adapter_inputs)}, named by their layers")
        table.add_row("parameters", f"{len(self.parameters)} initializers, by their torch names")
        for key in ("base_sha256", "adapter_sha256"):
            if key in self.provenance:
                table.add_row(key.replace("_", " "), Text(self.provenance[key]))
        table.add_row("time", ", ".join(f"{k} {v:.1f} s" for k, v in self.seconds.items()))
        console.print(table)
        if self.validation is None:
            console.print(Text("not validated: validation was switched off", style="yellow"))
        else:
            self.validation.render(console)
        if self.quantization is not None:
            self.quantization.render(console)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _signature(values: dict[str, tuple[int | str, ...]]) -> str:
    return "\n".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in values.items())


def _jsonable(value: Any) -> Any:
    """Tuples become lists, and numbers that JSON cannot hold become None."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Iterable):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
