"""What can be refused before anything expensive starts."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from gauge_ext.errors import ConfigError, ExportError, NonFiniteError

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.export.trace.inputs import BoundInputs

_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def require_packages(*names: str) -> None:
    """Asks for the packages of the ``export`` extra.

    Args:
        names: Import names; by default all that an export with validation needs.

    Raises:
        ExportError: one is not installed; says what to type.
    """
    missing = [name for name in names or _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.",
            hint="Type: pip install 'gauge-ext[export]'",
        )


def require_count(name: str, value: int) -> None:
    """Refuses what is not a number of things.

    Raises:
        ConfigError: not an integer, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a count of 0 or more, got {value!r}.")


def require_exportable(model: nn.Module, inputs: BoundInputs) -> None:
    """Refuses weights and inputs that could only give a file that does not run, or runs wrong.

    Raises:
        ExportError: a dtype that onnxruntime cannot compute with.
        NonFiniteError: a parameter holds NaN or infinity. Buffers may: causal masks hold -inf.
    """
    import torch

    from gauge_ext.adapters.quantized import is_encoded

    tensors: list[tuple[str, torch.Tensor]]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += zip(inputs.names, inputs.tensors, strict=True)
    bfloat = [name for name, tensor in tensors if tensor.dtype == torch.bfloat16]
    if bfloat:
        raise ExportError(
            f"{len(bfloat)} tensors are bfloat16, the first is {bfloat[0]!r}, and onnxruntime has "
            "no bfloat16 MatMul or Add for the CPU: the file would be written and never run.",
            hint="Convert a copy of the model first: model.float(), or model.half() for half size.",
        )
    for name, parameter in model.named_parameters():
        if is_encoded(parameter):  # codes are finite, and torchao's tensors have no isfinite
            continue
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            count = int((~parameter.isfinite()).sum())
            raise NonFiniteError(
                f"{name} holds NaN or infinity in {count} of {parameter.numel()} entries.",
                hint="Nothing was written; look at the training run or the file it came from.",
            )
