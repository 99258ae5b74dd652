"""What became of a graph in fewer bits, as numbers, as JSON and as text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.errors import ValidationError
from gauge_ext.export.precision.quantize_loss import LayerLoss
from gauge_ext.export.report import CaseResult
from gauge_ext.export.tolerance import Tolerance

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a graph in fewer bits.

    Attributes:
        path: The file.
        precision: How its weights are stored.
        bytes_before: Size of the float32 file, external data included.
        bytes_after: Size of this one.
        layers: What each weight lost.
        kept: Weights that stayed in float32.
        cases: The outputs against those of the float32 graph; empty where there were no inputs.
        provenance: The metadata that is the file's own and not that of the float32 file: its
            precision and, where there were inputs, ``validation``.
        tolerance: The bar that the outputs had to pass; None if none was given.
    """

    path: Path
    precision: str
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerLoss, ...]
    kept: tuple[str, ...]
    cases: tuple[CaseResult, ...]
    provenance: dict[str, str]
    tolerance: Tolerance | None = None

    @property
    def passed(self) -> bool:
        """Whether every output passed; with no tolerance: is finite where float32's is."""
        return all(case.passed for case in self.cases)

    @property
    def weight_error(self) -> float:
        """The root mean square of the layers' relative errors."""
        errors = [layer.error for layer in self.layers]
        return math.sqrt(math.fsum(e * e for e in errors) / len(errors)) if errors else 0.0

    @property
    def max_abs(self) -> float | None:
        """The largest difference of an output; None where none was measured."""
        return max((o.max_abs for case in self.cases for o in case.outputs), default=None)

    @property
    def cosine(self) -> float | None:
        """The least cosine of an output with float32's; None where none was measured."""
        found = [o.cosine for case in self.cases for o in case.outputs if o.cosine is not None]
        return min(found, default=None)

    def summary(self) -> dict[str, Any]:
        """The figures in short."""
        return {
            "weights": len(self.layers),
            "kept": len(self.kept),
            "weight_error": self.weight_error,
            "max_abs": self.max_abs,
            "cosine": self.cosine,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        from gauge_ext.export.report import _jsonable as jsonable

        return {
            "path": str(self.path),
            "precision": self.precision,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "passed": self.passed,
            "tolerance": None if self.tolerance is None else asdict(self.tolerance),
            **jsonable(self.summary()),
            "layers": jsonable([asdict(layer) for layer in self.layers]),
            "kept_in_float32": list(self.kept),
            "cases": [{**jsonable(asdict(case)), "passed": case.passed} for case in self.cases],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def render(self, console: Console) -> None:
        """Prints the sizes, the layers that lost most, and the outputs."""
        from rich.table import Table
        from rich.text import Text

        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        console.print(
            f"{self.path.name} in {self.precision}: {before:.1f} -> {after:.1f} MiB; "
            f"{len(self.layers)} weights, relative error {self.weight_error:.1e} (root mean "
            f"square); {len(self.kept)} kept in float32",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:5]
        for layer in worst:
            console.print(Text(f"  {layer.error:.1e}  {layer.name} ({layer.stored})"))
        if not self.cases:
            console.print(Text("outputs not measured: no inputs were given", style="yellow"))
            return
        table = Table(title="outputs against the float32 graph")
        for heading in ("case", "output"):
            table.add_column(heading)
        for heading in ("max abs", "relative", "cosine", "top-1"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for case in self.cases:
            if case.error is not None:
                table.add_row(case.name, Text("refused to run"), "", "", "", "", "FAIL")
            for output in case.outputs:
                table.add_row(
                    Text(case.name),
                    Text(output.name),
                    f"{output.max_abs:.1e}",
                    f"{output.relative:.1e}",
                    "" if output.cosine is None else f"{output.cosine:.6f}",
                    "" if output.top1 is None else f"{output.top1:.1%}",
                    _verdict(output.passed, self.tolerance),
                )
        console.print(table)


class QuantizationLossError(ValidationError):
    """A quantized graph loses more than was allowed.

    Attributes:
        report: All that was measured.
    """

    def __init__(self, report: QuantizationReport) -> None:
        reasons = [
            f"{case.name}: {case.error or output_reasons(case)}"
            for case in report.cases
            if not case.passed
        ]
        super().__init__(
            f"{report.precision} loses more than allowed in {len(reasons)} of {len(report.cases)} "
            f"cases: {'; '.join(reasons[:3])}.",
            hint="Nothing was written. Allow a larger loss, or keep more in float32.",
        )
        self.report = report


def output_reasons(case: CaseResult) -> str:
    """Why outputs failed, in one line."""
    return ", ".join(f"{o.name} {o.reason}" for o in case.outputs if not o.passed)


def _verdict(passed: bool, tolerance: Tolerance | None) -> str:
    if not passed:
        return "FAIL"
    return "measured" if tolerance is None else "ok"
