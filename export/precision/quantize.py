"""An ONNX file in fewer bits, with what that costs measured and said."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.declared import model_table
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.files import require_space, staged_files, write_errors
from gauge_ext.export.metadata import PREFIX, append_metadata, summary
from gauge_ext.export.precision.quantize_loss import layer_losses, output_losses, weights_of
from gauge_ext.export.precision.quantize_methods import (
    Feeds,
    Precision,
    QuantizationOptions,
    convert,
    prepare,
    require_precision,
)
from gauge_ext.export.precision.quantize_report import QuantizationLossError, QuantizationReport
from gauge_ext.export.validate import Focus

Cases = Iterable[tuple[str, Mapping[str, int], Feeds]]
_EXTERNAL_ABOVE = 2**30


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
    - ``int8-static``: the same with ranges of activations from calibration inputs, one for a whole
      tensor: an activation that is far larger than the others costs these their digits.
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
    focus: Focus | None = None,
) -> QuantizationReport:
    """Does the work of :func:`quantize_onnx` in a folder that is staged already.

    Args:
        source: The float32 file.
        draft: The file to write; its external data goes beside it.
        path: What it will be called.
        precision: How.
        options: See :class:`QuantizationOptions`.
        cases: Inputs to compare both on; those for adapters may be left out.
        focus: See :func:`gauge_ext.export.validate_onnx`.
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
    if (table := model_table(model)) is not None:
        # A range is that of a tensor with something in it: rank 1 where there is no adapter.
        nothing, zeros = table.nothing(), table.empty(rank=1)
        cases = ((name, sizes, {**nothing, **feeds}) for name, sizes, feeds in cases)
        options = replace(options, calibration=({**zeros, **f} for f in options.calibration))
    _require_filled(model, source)
    prepare(model, precision)
    exact = weights_of(model)
    with tempfile.TemporaryDirectory(dir=draft.parent) as work, write_errors(path):
        made = convert(model, Path(work) / "model.onnx", precision, options)
        layers, kept = layer_losses(exact, made)
        _save(made, draft, path, said)
    del made
    found = output_losses(source, draft, cases, options.tolerance, focus)
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
    draft: Path,
    path: Path,
    precision: Precision,
    options: QuantizationOptions,
    cases: Cases,
    focus: Focus | None = None,
) -> QuantizationReport:
    """Puts a graph in fewer bits in the place of a draft; see :func:`quantize_draft`."""
    with tempfile.TemporaryDirectory(dir=draft.parent) as aside:
        for file in [file for file in draft.parent.iterdir() if file.is_file()]:
            if file == draft or file.name.startswith(f"{draft.name}."):  # its external data
                file.rename(Path(aside) / file.name)
        exact = Path(aside) / draft.name
        return quantize_draft(exact, draft, path, precision, options, cases, focus)


def _require_filled(model: Any, source: Path) -> None:
    """Whether each float32 weight has as many numbers as its shape says."""
    import onnx

    for tensor in model.graph.initializer:
        dims = list(tensor.dims)
        there = len(tensor.float_data) or len(tensor.raw_data) / 4
        wanted = there if tensor.data_type != onnx.TensorProto.FLOAT else math.prod(dims)
        if min(dims, default=0) < 0 or wanted != there:
            raise ConfigError(
                f"{source} is not a whole ONNX file: {tensor.name} of shape {dims} has "
                f"{there:g} numbers."
            )


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
