"""From a torch model, with or without an adapter, to a validated ONNX file.

The order in which to read:

- :mod:`to_onnx` is the whole road in one function. On the way: :mod:`checks` (what is refused at
  once), :mod:`trace` (from torch to a graph), :mod:`metadata` (where it came from), :mod:`disk`
  (everything or nothing, a few rows at a time).
- :mod:`validate` runs onnxruntime against torch: :mod:`compare` and :mod:`tolerance` judge,
  :mod:`report` shows. :mod:`proof` compares runtimes, speed, memory and text, on one page;
  :mod:`provenance` reads and checks what a file says about itself.
- :mod:`adapters`: graphs that take adapters as inputs, and the session that switches them.
- :mod:`language`: models that generate, with their key-value cache, and the loop around them.
- :mod:`patching`: adapters into files that exist already, without torch.
- :mod:`precision`: fewer bits, and what they cost.

Importing this imports nothing else: torch, onnx and onnxruntime are asked for when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "gauge_ext.export":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as gauge_ext.export "
        "(two names for one module would make two copies of every class)"
    )

from gauge_ext._lazy import deferred

if TYPE_CHECKING:
    from gauge_ext.export.adapters.file import AdapterFileReport, write_onnx_adapter
    from gauge_ext.export.adapters.session import AdapterSession
    from gauge_ext.export.language.causal_lm import export_causal_lm, validate_causal_lm
    from gauge_ext.export.language.generate import OnnxGenerator
    from gauge_ext.export.language.model_report import ModelReport
    from gauge_ext.export.language.seq2seq import export_seq2seq, validate_seq2seq
    from gauge_ext.export.patching.merge import MergeReport, merge_checkpoint
    from gauge_ext.export.patching.patch import PatchedWeight, PatchReport, patch_onnx
    from gauge_ext.export.precision.quantize import quantize_onnx
    from gauge_ext.export.precision.quantize_methods import QuantizationOptions
    from gauge_ext.export.precision.quantize_report import (
        QuantizationLossError,
        QuantizationReport,
    )
    from gauge_ext.export.provenance import Provenance, check_provenance, read_provenance
    from gauge_ext.export.report import CaseResult, ExportReport, OutputDifference, ValidationReport
    from gauge_ext.export.to_onnx import export_onnx
    from gauge_ext.export.tolerance import Tolerance
    from gauge_ext.export.validate import DisagreementError, validate_onnx
else:
    __getattr__, __dir__ = deferred(__name__)

__all__ = [
    "AdapterFileReport",
    "AdapterSession",
    "CaseResult",
    "DisagreementError",
    "ExportReport",
    "MergeReport",
    "ModelReport",
    "OnnxGenerator",
    "OutputDifference",
    "PatchReport",
    "PatchedWeight",
    "Provenance",
    "QuantizationLossError",
    "QuantizationOptions",
    "QuantizationReport",
    "Tolerance",
    "ValidationReport",
    "check_provenance",
    "export_causal_lm",
    "export_onnx",
    "export_seq2seq",
    "merge_checkpoint",
    "patch_onnx",
    "quantize_onnx",
    "read_provenance",
    "validate_causal_lm",
    "validate_onnx",
    "validate_seq2seq",
    "write_onnx_adapter",
]
