"""A graph opened in onnxruntime; nothing else is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gauge_ext.errors import ConfigError, ExportError

CPU = ("CPUExecutionProvider",)


def open_session(
    path: str | Path, options: Any = None, providers: Sequence[Any] = CPU
) -> tuple[Any, str]:
    """An onnxruntime session of a file, and the runtime's name and version.

    Args:
        path: The ONNX file; external data lies beside it.
        options: An ``onnxruntime.SessionOptions``; None for the usual ones, without warnings.
        providers: Execution providers of onnxruntime.

    Raises:
        ConfigError: there is no such file.
        ExportError: onnxruntime is not installed or cannot load it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime is not installed.", hint="Type: pip install onnxruntime"
        ) from error
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}.", hint="Give the path of an ONNX file.")
    if options is None:
        options = onnxruntime.SessionOptions()
        # Errors come as exceptions; warnings are about its own passes, and about every input with
        # a default, which is what inputs for adapters are meant to be.
        options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        # Names that are no text are found here, and not by whoever asks for them first.
        _ = session.get_modelmeta().custom_metadata_map
        _ = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    # onnxruntime's exceptions have no common base but Exception. They are raised on with their
    # words, which name the file that was run; in an export it is a draft that is gone by now.
    except Exception as error:
        words = str(error).strip().replace(str(path), path.name)
        raise ExportError(
            f"onnxruntime cannot load {path.name}: {words}",
            hint="If an operator is not implemented for this dtype, export in float32.",
        ) from error
    first = str(session.get_providers()[0]).removesuffix("ExecutionProvider")
    return session, f"onnxruntime {onnxruntime.__version__} ({first})"
