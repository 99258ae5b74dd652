"""Encoder-decoder models as two graphs, of which the decoder has a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gauge_ext.export.adapters.codes import AdapterPrecision
from gauge_ext.export.adapters.table import AdapterForm
from gauge_ext.export.language.cached import decoder_step, encoder_step
from gauge_ext.export.language.causal_inputs import BATCH, PAST, SEQUENCE
from gauge_ext.export.language.folder import GraphOptions, Kind, export_folder, judge
from gauge_ext.export.language.graphs import DECODER, ENCODER
from gauge_ext.export.language.loop import Sample
from gauge_ext.export.language.model_report import ModelReport
from gauge_ext.export.language.seq2seq_inputs import SOURCE, Seq2SeqInputs
from gauge_ext.export.precision.quantize_methods import Precision, QuantizationOptions
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import ValidationReport
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.validate import Progress
from gauge_ext.models.adapted import unwrap

_EXAMPLE = {BATCH: 2, SEQUENCE: 3, PAST: 5, SOURCE: 7}
_CASES = {
    "first token": {BATCH: 3, SEQUENCE: 1, PAST: 0, SOURCE: 6},
    "prefill": {BATCH: 2, SEQUENCE: 6, PAST: 0, SOURCE: 9},
    "decode 1": {BATCH: 3, SEQUENCE: 1, PAST: 8, SOURCE: 4},
    "decode 4": {BATCH: 2, SEQUENCE: 4, PAST: 6, SOURCE: 11},
    "decode 1, one row": {BATCH: 1, SEQUENCE: 1, PAST: 4, SOURCE: 1},
}
_PIECES = (1, 1, 4)  # of the loop: the first token, another, then several at once


def export_seq2seq(
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
    """Writes an encoder-decoder model as two graphs: merged, or open for adapters.

    ``encoder_model.onnx`` takes ``input_ids`` and ``attention_mask (batch_size,
    encoder_sequence_length)``, or ``input_features`` of speech; it gives ``last_hidden_state`` and
    ``present.N.encoder.key`` and ``.value``, the keys and values of the decoder's cross attention.

    ``decoder_model.onnx`` takes ``decoder_input_ids (batch_size, sequence_length)``, the
    ``encoder_attention_mask``, ``past_key_values.N.decoder.key`` and ``.value`` (empty at first)
    and ``past_key_values.N.encoder.key`` and ``.value``; it gives ``logits`` and
    ``present.N.decoder.key`` and ``.value``. One graph serves the first step and all others, so
    that no weight is stored for each of them.

    With ``mode="adapters"`` each graph has the inputs of its own layers: the encoder's graph those
    of the encoder and of the keys and values of the cross attention, the decoder's all others.

    Args:
        model: T5, BART, Whisper and others of transformers whose decoder has a cross attention.
        folder: The folder to write; it must not exist or be empty.
        source: The folder that the model was loaded from, for its tokenizer or processor.
        mode: See :func:`gauge_ext.export.export_causal_lm`; so are the following.
        adapter_targets: Which layers take factors, with ``mode="adapters"``.
        adapter_form: "optional" or "required".
        adapter_precision: "float32", "float16", "int8", or None.
        precision: "fp32", "fp16", "int8", "int8-static" or "int4": how the weights are stored. The
            graphs are validated in float32 and quantized then (int8-static with the ranges that the
            prompts in ``quantization.calibration`` give, in prefill and in the steps after it);
            what that costs is measured in each weight, on
            the outputs against float32, and by letting the graphs generate beside torch.
        quantization: More about that.
        opset: Version of the operators.
        external_data: Whether weights go into files of their own.
        validate: Whether to run the graphs before the folder is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        seed: Of the inputs that they run on.
        provenance: More metadata, text to text.
        progress: Called with what is being done and the share done.

    Returns:
        What was written, and what validation found.

    Raises:
        ConfigError: this is no such model, or an argument cannot be used.
        TargetError: with ``mode="adapters"``, a layer is none that can take factors as inputs.
        ExportError: torch cannot translate it, onnxruntime cannot load a graph, or a package is
            missing.
        ValidationError: onnxruntime and torch disagree, or fewer bits lose more than
            ``quantization.tolerance``.
        WriteError: the folder cannot be written.
    """
    return export_folder(
        seq2seq_kind(model),
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


def validate_seq2seq(
    folder: str | Path,
    model: nn.Module,
    *,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[ValidationReport, ValidationReport, ValidationReport]:
    """Compares a folder that :func:`export_seq2seq` wrote with a model.

    Returns:
        The encoder; the decoder, one step with a given past; and both in a loop against the plain
        model, which sees all tokens at once and has no cache.

    Raises:
        ConfigError: the folder has no such graphs, or this is another kind of model.
        ExportError: onnxruntime is missing or cannot load a graph.
    """
    (encoder, decoder), whole = judge(seq2seq_kind(model), Path(folder), tolerance, seed, progress)
    return encoder, decoder, whole


def seq2seq_kind(model: nn.Module) -> Kind:
    """What an encoder-decoder model becomes.

    Raises:
        ConfigError: this is another kind of model.
    """
    inner = unwrap(model)
    inputs = Seq2SeqInputs.of(inner)
    return Kind(
        task="seq2seq",
        model=inner,
        subjects=lambda folder, seed: _subjects(folder, inner, inputs, seed),
        axes=[inputs.encoder_shapes, inputs.decoder_shapes],
        sample=lambda seed: _sample(inputs, seed),
        settings=lambda report: {},
    )


def _subjects(folder: Path, model: nn.Module, inputs: Seq2SeqInputs, seed: int) -> list[Subject]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Subject(
            folder / ENCODER,
            encoder_step(model),
            inputs.encoder(_EXAMPLE, generator),
            random_cases=1,
            timed={"source of 32": {SOURCE: 32}} if inputs.frames is None else {},
        ),
        Subject(
            folder / DECODER,
            decoder_step(model),
            inputs(_EXAMPLE, generator),
            make_inputs=inputs,
            cases=_CASES,
            random_cases=0,
            timed={"decode 1 after 16": {SEQUENCE: 1, PAST: 16, SOURCE: 32}},
        ),
    ]


def _sample(inputs: Seq2SeqInputs, seed: int) -> Sample:
    """The encoder's result into the decoder, token after token."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows, length = 2, sum(_PIECES)
    given = inputs.encoder({BATCH: rows, SOURCE: 8}, generator)
    ids = torch.randint(inputs.vocabulary, (rows, length), generator=generator)
    return Sample(
        name="encoder, then a loop of " + ", ".join(map(str, _PIECES)) + " tokens",
        source=next(iter(given.values())),
        source_mask=given.get("attention_mask"),
        ids=ids,
        mask=torch.ones_like(ids),
        pieces=_PIECES,
        whole=lambda ids, mask: {**given, "decoder_input_ids": ids},
        sizes={BATCH: rows, SEQUENCE: length},
    )
