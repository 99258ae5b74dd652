"""The errors that a user can cause and can mend.

Every message says what was expected and what came; ``hint`` says what to do about it. The command
line prints both and leaves with a non-zero status; anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class GaugeError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: What is wrong: the argument or file, what was expected, what came.
        hint: What to do about it, one sentence; shown after the message.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.message = message
        self.hint = hint


class ConfigError(GaugeError, ValueError):
    """An option or a config field has a value that cannot be used."""


class TargetError(GaugeError, ValueError):
    """No module, or a module of an unsupported type, answers to ``target_modules``."""


class AdapterFormatError(GaugeError, ValueError):
    """A folder or file is not an adapter that can be read."""


class AdapterMismatchError(GaugeError, ValueError):
    """An adapter does not fit the model: other modules, other shapes, another rank."""


class NonFiniteError(GaugeError, ValueError):
    """A weight or an output holds NaN or infinity."""


class GeometryError(GaugeError, ValueError):
    """Something is undefined at this point: rank-deficient factors, overlap too small."""


class AdapterStateError(GaugeError, RuntimeError):
    """The model is in the wrong state for the call: merged twice, nothing attached."""


class WriteError(GaugeError, OSError):
    """A file could not be written; nothing was left at the target path."""


class ExportError(GaugeError, RuntimeError):
    """A model could not be turned into an ONNX graph."""


class ValidationError(ExportError):
    """An ONNX graph ran and disagrees with torch by more than the tolerance."""


class ExtensionError(GaugeError, ImportError):
    """The compiled extension is missing, or was built against another torch."""
