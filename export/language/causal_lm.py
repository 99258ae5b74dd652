"""Decoder-only language models as one graph with a key-value cache, proven in a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gauge_ext.export.adapters.codes import AdapterPrecision
from gauge_ext.export.adapters.table import AdapterForm
from gauge_ext.export.language.cached import causal_step
from gauge_ext.export.language.causal_inputs import (
    BATCH,
    PAST,
    SEQUENCE,
    CausalInputs,
    positions_of,
)
from gauge_ext.export.language.folder import GraphOptions, Kind, export_folder, judge
from gauge_ext.export.language.genai import genai_config
from gauge_ext.export.language.graphs import CAUSAL
from gauge_ext.export.language.loop import Sample
from gauge_ext.export.language.model_report import ModelReport
from gauge_ext.export.precision.quantize_methods import Precision, QuantizationOptions
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import Limits
from gauge_ext.export.validate import Progress
from gauge_ext.models.adapted import unwrap

_EXAMPLE = {BATCH: 2, SEQUENCE: 3, PAST: 5}
_CASES = {
    "prefill": {BATCH: 3, SEQUENCE: 8, PAST: 0},
    "prefill of one token": {BATCH: 1, SEQUENCE: 1, PAST: 0},
    "decode 1": {BATCH: 3, SEQUENCE: 1, PAST: 9},
    "decode 4": {BATCH: 2, SEQUENCE: 4, PAST: 6},
    "decode 1, one row": {BATCH: 1, SEQUENCE: 1, PAST: 4},
}
_PIECES = (5, 1, 4)  # of the loop: a prefill, then a token, then several at once


def export_causal_lm(
    model: nn.Module,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    mode: Literal["merged", "adapters"] = "merged",
    adapter_targets: str | Sequence[str] | None = None,
    adapter_form: AdapterForm = "optional",
    adapter_precision: AdapterPrecision | None = None,
    precision: Precision = "fp32",
    quantization: QuantizationOptions | None = None,
    opset: int = 20,
    external_data: bool | None = None,
    validate: bool = True,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Writes a decoder-only language model as a graph with a cache: merged, or open for adapters.

    ``model.onnx`` takes ``input_ids (batch_size, sequence_length)``, ``attention_mask (batch_size,
    past_sequence_length + sequence_length)``, ``position_ids`` where the model takes them, and
    ``past_key_values.N.key`` and ``.value (batch_size, key/value heads, past_sequence_length, head
    size)``; it gives ``logits`` for every new token and ``present.N.key`` and ``.value``, the past
    with the new tokens behind it. Heads are those of the cache: fewer than the queries' where the
    model groups them. A past of length 0 is a prefill. A tied output layer is stored once.

    Beside it go ``config.json``, ``generation_config.json``, ``genai_config.json`` for
    onnxruntime-genai, and the tokenizer's files of ``source``.

    With ``mode="adapters"`` the graph holds the base, and takes adapters beside these inputs as
    :func:`~gauge_ext.export.export_onnx` says; :class:`~gauge_ext.export.OnnxGenerator` switches
    between them call by call.

    Validation runs prefill, decode of 1 and of 4 tokens against the unmerged model, and a prefill
    with left padding, one token and four tokens in a row against the plain model without a cache.
    With ``mode="adapters"`` all that is done without an adapter and, if the model has one, with it.

    Args:
        model: A model of transformers that generates, with adapters or without: Llama, Qwen,
            Mistral, Gemma, GPT-2 and others whose cache is one key and one value for each layer.
        folder: The folder to write; it must not exist or be empty.
        source: The folder that the model was loaded from, for its tokenizer.
        mode: "merged": a copy of the adapters goes into the weights. "adapters": they are inputs.
        adapter_targets: See :func:`gauge_ext.export.export_onnx`; so are the following.
        adapter_form: "optional" or "required".
        adapter_precision: "float32", "float16", "int8", or None.
        precision: "fp32", "fp16", "int8", "int8-static" or "int4": how the weights are stored. The
            graphs are validated in float32 and quantized then (int8-static with the ranges that the
            prompts in ``quantization.calibration`` give, in prefill and in the steps after it);
            what that costs is measured in each weight, on
            the outputs against float32, and by letting the graphs generate beside torch.
        quantization: More about that.
        opset: Version of the operators.
        external_data: Whether the weights go into a file of their own, ``model.onnx.data``.
        validate: Whether to run the graph before the folder is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        seed: Of the inputs that it runs on.
        provenance: More metadata, text to text.
        progress: Called with what is being done and the share done.

    Returns:
        What was written, and what validation found.

    Raises:
        ConfigError: this is no such model, or an argument cannot be used.
        TargetError: with ``mode="adapters"``, a layer is none that can take factors as inputs.
        ExportError: torch cannot translate it, its cache is of another kind, onnxruntime cannot
            load the result, or a package is missing.
        ValidationError: onnxruntime and torch disagree, or fewer bits lose more than
            ``quantization.tolerance``.
        WriteError: the folder cannot be written.
    """
    return export_folder(
        causal_kind(model),
        Path(folder),
        GraphOptions(opset, external_data, mode, adapter_targets, adapter_form, adapter_precision),
        source=None if source is None else Path(source),
        precision=precision,
        quantization=quantization,
        validate=validate,
        tolerance=tolerance,
        seed=seed,
        provenance=provenance,
        progress=progress,
    )


def validate_causal_lm(
    folder: str | Path,
    model: nn.Module,
    *,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[ValidationReport, ValidationReport]:
    """Compares a folder that :func:`export_causal_lm` wrote with a model.

    Args:
        folder: The folder.
        model: The model, with its adapters beside the weights or merged.
        tolerance: The bar; by default by dtype.
        seed: Of the inputs.
        progress: Called with what is being done and the share done.

    Returns:
        The graph against one step of torch with the same past; and the graph in a loop against the
        plain model, which sees all tokens at once and has no cache.

    Raises:
        ConfigError: the folder has no such graph, or this is another kind of model.
        ExportError: onnxruntime is missing or cannot load the graph.
    """
    found, whole = judge(causal_kind(model), Path(folder), tolerance, seed, progress)
    return found[0], whole


def causal_kind(model: nn.Module) -> Kind:
    """What a decoder-only model becomes.

    Raises:
        ConfigError: this is another kind of model.
        ExportError: its cache is of another kind.
    """
    inner = unwrap(model)
    inputs = CausalInputs.of(inner)
    return Kind(
        task="text-generation",
        model=inner,
        subjects=lambda folder, seed: [_subject(folder, inner, inputs, seed)],
        axes=[inputs.dynamic_shapes],
        sample=lambda seed: _sample(inputs, seed),
        settings=lambda report: {
            "genai_config.json": genai_config(inner, report.inputs, report.outputs, CAUSAL)
        },
    )


def _subject(folder: Path, model: nn.Module, inputs: CausalInputs, seed: int) -> Subject:
    longest = min(32, (Limits.of(model).positions or 33) - 1)
    return Subject(
        folder / CAUSAL,
        causal_step(model),
        inputs(_EXAMPLE, torch.Generator().manual_seed(seed)),
        make_inputs=inputs,
        cases=_CASES,
        focus=_visible,
        random_cases=0,
        timed={
            f"prefill of {longest}": {SEQUENCE: longest, PAST: 0},
            f"decode 1 after {longest}": {SEQUENCE: 1, PAST: longest},
        },
    )


def _visible(name: str, output: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """What a step says of tokens that are not padding: a row that sees nothing is undefined."""
    mask = given["attention_mask"].bool()
    if name == "logits":
        return output[mask[:, -output.shape[1] :]]
    return output.transpose(1, 2)[mask]


def _sample(inputs: CausalInputs, seed: int) -> Sample:
    """Prefill with left padding, one token, four tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows, length = 3, sum(_PIECES)
    ids = torch.randint(inputs.vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : _PIECES[0] - 1], mask[2, :2] = 0, 0

    def whole(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        given = {"position_ids": positions_of(mask)} if inputs.positions else {}
        return {"input_ids": ids, "attention_mask": mask, **given}

    return Sample(
        name="loop of " + ", ".join(map(str, _PIECES)) + " tokens, left padding",
        source=ids,
        source_mask=None,
        ids=ids,
        mask=mask,
        pieces=_PIECES,
        whole=whole,
        sizes={BATCH: rows, SEQUENCE: length},
    )
