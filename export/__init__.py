"""From a torch model, with or without an adapter, to a validated ONNX file.

The order in which to read:

- :mod:`to_onnx` is the whole road in one function. On the way: :mod:`checks` (what is refused at
  once), :mod:`inputs` (arguments and dynamic shapes in one form), :mod:`signature` (names of inputs
  and outputs), :mod:`graph` and :mod:`axes` (torch to ONNX), :mod:`metadata` (where it came from),
  :mod:`files` (everything or nothing on disk).
- :mod:`validate` runs onnxruntime against torch: :mod:`cases` and :mod:`expressions` make inputs of
  other sizes, :mod:`compare` and :mod:`tolerance` judge, :mod:`report` shows.
- :mod:`adapter_graph` makes inputs of the factors of adapters; :mod:`adapter_table` says which are
  whose, :mod:`adapter_file` writes adapters that fit, :mod:`adapter_read` reads them,
  :mod:`adapter_session` runs them, :mod:`adapter_mix` adds several up.
  :mod:`adapter_validate` and :mod:`adapter_feeds` prove such a graph.
- :mod:`causal_lm` and :mod:`seq2seq` write models that generate with their key-value cache:
  :mod:`cached` gives a model tensors for a cache, :mod:`generate`, :mod:`choose` and
  :mod:`sampling` are the loop in onnxruntime, :mod:`model_folder` and :mod:`genai` what lies
  beside the graphs.
- :mod:`proof` compares runtimes, speed, memory and text, on one page; :mod:`provenance` reads and
  checks what a file says about itself.
- :mod:`merge` (into a folder of weights, :mod:`base_folder`) and :mod:`patch` (into an ONNX file)
  need no torch. :mod:`adapter_arrays` reads adapters; :mod:`update` adds them to weights on the way
  from one place of a file (:mod:`spans`) to another, as :mod:`numbers` or as blocks (:mod:`nbits`);
  :mod:`resume` goes on after an interruption.
- An ONNX file that is not loaded: :mod:`wire` walks its protobuf, :mod:`onnx_file` says where each
  weight lies, :mod:`splice` and :mod:`onnx_copy` write it anew around some of them. :mod:`sites`
  finds its linear layers, :mod:`homes` and :mod:`likeness` which module is which,
  :mod:`verify_patch` and :mod:`feeds` prove the result in onnxruntime.
- :mod:`quantize` stores a graph in fewer bits: :mod:`quantize_methods` says how,
  :mod:`quantize_loss` what it costs.

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
    from gauge_ext.export.adapter_file import AdapterFileReport, write_onnx_adapter
    from gauge_ext.export.adapter_session import AdapterSession
    from gauge_ext.export.causal_lm import export_causal_lm, validate_causal_lm
    from gauge_ext.export.generate import OnnxGenerator
    from gauge_ext.export.merge import MergeReport, merge_checkpoint
    from gauge_ext.export.model_folder import ModelReport
    from gauge_ext.export.patch import PatchedWeight, PatchReport, patch_onnx
    from gauge_ext.export.provenance import Provenance, check_provenance, read_provenance
    from gauge_ext.export.quantize import (
        QuantizationLossError,
        QuantizationReport,
        quantize_onnx,
    )
    from gauge_ext.export.quantize_methods import QuantizationOptions
    from gauge_ext.export.report import CaseResult, ExportReport, OutputDifference, ValidationReport
    from gauge_ext.export.seq2seq import export_seq2seq, validate_seq2seq
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
