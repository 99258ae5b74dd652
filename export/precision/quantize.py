"""An ONNX file in fewer bits, with what that costs measured and said."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gauge_ext.errors import ConfigError, ValidationError
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.files import require_space, staged_files, write_errors
from gauge_ext.export.metadata import PREFIX, append_metadata, summary
from gauge_ext.export.precision.quantize_loss import (
    LayerLoss,
    layer_losses,
    output_losses,
    weights_of,
)
from gauge_ext.export.precision.quantize_methods import (
    Feeds,
    Precision,
    QuantizationOptions,
    convert,
    prepare,
    require_precision,
)
from gauge_ext.export.report import CaseResult
from gauge_ext.export.tolerance import Tolerance

if TYPE_CHECKING:
    from rich.console import Console

Cases = Iterable[tuple[str, Mapping[str, int], Feeds]]
_EXTERNAL_ABOVE = 2**30


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


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    precision: Precision,
    *,
    inputs: Sequence[Feeds] = (),
    options: QuantizationOptions | None = None,
) -> QuantizationReport:
    """Writes a float32 ONNX file in fewer bits, and measures what that costs.

    - ``fp16``: all but norms, softmax, powers and sums; inputs and outputs stay float32.
    - ``int8``: weights per output channel, activations when it runs (dynamic).
    - ``int8-static``: the same with ranges of activations from calibration inputs.
    - ``int4``: weights of linear layers in blocks, asymmetric (MatMulNBits).

    Merge an adapter first: ``W + s B A`` is rounded once, and not W and the update apart.

    Args:
        source: The float32 file.
        path: The file to write; it may be ``source``.
        precision: How.
        inputs: Sets of inputs by name, on which both graphs are run and compared.
        options: Calibration inputs, block size, what stays in float32, how much may be lost.

    Returns:
        The losses of weights and outputs.

    Raises:
        ConfigError: an option cannot be used, or the inputs do not fit.
        NonFiniteError: a weight exceeds float16.
        ExportError: onnxruntime's tools refuse the graph.
        ValidationError: the loss exceeds ``options.tolerance``, or NaN came up; nothing is written.
        WriteError: the file cannot be written.
    """
    options = options or QuantizationOptions()
    require_precision(precision, options)
    require_packages("onnx", "onnxruntime")
    source, path = Path(source), Path(path)
    if not source.is_file():
        raise ConfigError(f"there is no file {source}.", hint="Give the path of an ONNX file.")
    cases = [(f"input {number + 1}", _sizes(feeds), feeds) for number, feeds in enumerate(inputs)]
    with staged_files(path) as folder:
        return quantize_draft(source, folder / path.name, path, precision, options, cases)


def quantize_draft(
    source: Path,
    draft: Path,
    path: Path,
    precision: Precision,
    options: QuantizationOptions,
    cases: Cases,
) -> QuantizationReport:
    """Does the work of :func:`quantize_onnx` in a folder that is staged already.

    Args:
        source: The float32 file.
        draft: The file to write; its external data goes beside it.
        path: What it will be called.
        precision: How.
        options: See :class:`QuantizationOptions`.
        cases: Inputs to compare both on.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = _file_size(source)
        model = onnx.load(str(source), format="protobuf")
    # The last two are of weights beside the file that are missing, outside its folder or cut short.
    except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise ConfigError(f"{source} is not a whole ONNX file: {error}.") from error
    require_space(path, size)
    said = {entry.key: entry.value for entry in model.metadata_props}
    # What running the float32 graph found says nothing of this one.
    said.pop(f"{PREFIX}validation", None)
    if (already := said.pop(f"{PREFIX}precision", "fp32")) != "fp32":
        raise ConfigError(
            f"{source} is in {already} already.", hint="Quantize the float32 file it came from."
        )
    prepare(model, precision)
    exact = weights_of(model)
    with tempfile.TemporaryDirectory(dir=draft.parent) as work, write_errors(path):
        made = convert(model, Path(work) / "model.onnx", precision, options)
        layers, kept = layer_losses(exact, made)
        _save(made, draft, path, said)
    del made
    found = output_losses(source, draft, cases, options.tolerance)
    own = {"precision": str(precision)}
    if found.cases:
        own |= summary(found, against="float32")
    append_metadata(draft, own)
    report = QuantizationReport(
        path=path,
        precision=precision,
        bytes_before=size,
        bytes_after=_file_size(draft),
        layers=layers,
        kept=kept,
        cases=found.cases,
        provenance=own,
        tolerance=options.tolerance,
    )
    if not report.passed:
        raise QuantizationLossError(report)
    return report


def quantize_in_place(
    draft: Path, path: Path, precision: Precision, options: QuantizationOptions, cases: Cases
) -> QuantizationReport:
    """Puts a graph in fewer bits in the place of a draft that is alone in its folder."""
    with tempfile.TemporaryDirectory(dir=draft.parent) as aside:
        for file in [file for file in draft.parent.iterdir() if file.is_file()]:
            file.rename(Path(aside) / file.name)
        return quantize_draft(Path(aside) / draft.name, draft, path, precision, options, cases)


def _save(model: Any, draft: Path, path: Path, said: Mapping[str, str]) -> None:
    import onnx

    del model.metadata_props[:]
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    external = model.ByteSize() > _EXTERNAL_ABOVE
    onnx.save(
        model,
        str(draft),
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
    )


def _file_size(path: Path) -> int:
    """The size of an ONNX file with its external data."""
    import onnx

    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    files = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = [path.parent / str(name) for name in files]
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())


def _sizes(feeds: Feeds) -> dict[str, int]:
    return {
        f"{name}.{axis}": size
        for name, array in feeds.items()
        for axis, size in enumerate(np.shape(array)[:2])
    }


def _verdict(passed: bool, tolerance: Tolerance | None) -> str:
    if not passed:
        return "FAIL"
    return "measured" if tolerance is None else "ok"
