"""Encoder-decoder models as two graphs, of which the decoder has a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.checks import require_packages
from gauge_ext.export.compare import compare
from gauge_ext.export.disk.files import staged_folder
from gauge_ext.export.language.cached import decoder_step, encoder_step
from gauge_ext.export.language.causal_lm import BATCH, PAST, SEQUENCE
from gauge_ext.export.language.model_folder import (
    ModelReport,
    placed,
    report_of,
    settle,
    write_manifest,
    write_settings,
)
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import CaseResult, ExportReport, ValidationReport
from gauge_ext.export.to_onnx import export_onnx
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import Limits
from gauge_ext.export.validate import (
    DisagreementError,
    Progress,
    evaluation_copy,
    float_dtypes,
    open_session,
    usual_tolerance,
)
from gauge_ext.models.attach import unwrap

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
SOURCE = "encoder_sequence_length"
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
    opset: int = 20,
    external_data: bool | None = None,
    validate: bool = True,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Merges a copy of an encoder-decoder model and writes it as an encoder and a decoder.

    ``encoder_model.onnx`` takes ``input_ids`` and ``attention_mask (batch_size,
    encoder_sequence_length)``, or ``input_features`` of speech; it gives ``last_hidden_state`` and
    ``present.N.encoder.key`` and ``.value``, the keys and values of the decoder's cross attention.

    ``decoder_model.onnx`` takes ``decoder_input_ids (batch_size, sequence_length)``, the
    ``encoder_attention_mask``, ``past_key_values.N.decoder.key`` and ``.value`` (empty at first)
    and ``past_key_values.N.encoder.key`` and ``.value``; it gives ``logits`` and
    ``present.N.decoder.key`` and ``.value``. One graph serves the first step and all others, so
    that no weight is stored for each of them.

    Args:
        model: T5, BART, Whisper and others of transformers whose decoder has a cross attention.
        folder: The folder to write; it must not exist or be empty.
        source: The folder that the model was loaded from, for its tokenizer or processor.
        opset: See :func:`gauge_ext.export.export_causal_lm`; so are the others.
        external_data: Whether weights go into files of their own.
        validate: Whether to run the graphs before the folder is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        seed: Of the inputs that they run on.
        provenance: More metadata, text to text.
        progress: Called with what is being done and the share done.

    Returns:
        What was written, and what validation found.

    Raises:
        ConfigError: this is no such model.
        ExportError: torch cannot translate it, onnxruntime cannot load a graph, or a package is
            missing.
        ValidationError: onnxruntime and torch disagree.
        WriteError: the folder cannot be written.
    """
    require_packages()
    folder = Path(folder)
    inner = unwrap(model)
    inputs = Seq2SeqInputs.of(inner)
    tell = progress or (lambda what, share: None)
    with staged_folder(folder) as draft:
        reports: list[ExportReport] = []
        shapes = (inputs.encoder_shapes, inputs.decoder_shapes)
        subjects = seq2seq_subjects(draft, inner, seed)
        for index, (subject, axes) in enumerate(zip(subjects, shapes, strict=True)):
            reports.append(
                export_onnx(
                    subject.module,
                    subject.example,
                    subject.path,
                    dynamic_shapes=axes,
                    opset=opset,
                    external_data=external_data,
                    validate=False,
                    provenance={"task": "seq2seq", **(provenance or {})},
                    progress=lambda what, share, index=index: tell(  # type: ignore[misc]
                        what, 0.3 * (index + share)
                    ),
                )
            )
        found: tuple[ValidationReport | None, ...] = (None, None, None)
        if validate:
            found = validate_seq2seq(
                draft,
                inner,
                tolerance=tolerance,
                seed=seed,
                progress=lambda what, share: tell(what, 0.6 + 0.4 * share),
            )
            for judged in found:
                if judged is not None and not judged.passed:
                    raise DisagreementError(placed(judged, folder))
        graphs = [
            settle(report, draft, one, whole)
            for report, one, whole in zip(reports, found[:2], (None, found[2]), strict=True)
        ]
        write_settings(inner, draft, None if source is None else Path(source))
        write_manifest(draft, "seq2seq")
        return report_of(draft, folder, "seq2seq", graphs, found[2])


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
    encoder, decoder = seq2seq_subjects(Path(folder), model, seed)
    told = progress or (lambda what, share: None)
    return (
        encoder.validate(
            tolerance=tolerance, seed=seed, progress=lambda what, share: told(what, share / 3)
        ),
        decoder.validate(
            tolerance=tolerance,
            seed=seed,
            progress=lambda what, share: told(what, (1 + 2 * share) / 3),
        ),
        seq2seq_whole(Path(folder), model, tolerance, seed),
    )


def seq2seq_subjects(folder: Path, model: nn.Module, seed: int) -> list[Subject]:
    """Encoder and decoder of a folder, and what they have to equal.

    Raises:
        ConfigError: this is another kind of model.
    """
    inner = unwrap(model)
    inputs = Seq2SeqInputs.of(inner)
    generator = torch.Generator().manual_seed(seed)
    return [
        Subject(
            folder / ENCODER,
            encoder_step(inner),
            inputs.encoder(_EXAMPLE, generator),
            random_cases=1,
            timed={"source of 32": {SOURCE: 32}} if inputs.frames is None else {},
        ),
        Subject(
            folder / DECODER,
            decoder_step(inner),
            inputs(_EXAMPLE, generator),
            make_inputs=inputs,
            cases=_CASES,
            random_cases=0,
            timed={"decode 1 after 16": {SEQUENCE: 1, PAST: 16, SOURCE: 32}},
        ),
    ]


@dataclass(frozen=True)
class Seq2SeqInputs:
    """Makes inputs of both graphs for given sizes.

    Attributes:
        layers: How many layers the decoder has.
        heads: Of its attention.
        size: Of each head.
        vocabulary: Token ids are below this.
        features: Shape of one sample of speech, ``(mel bins, frames)``; None for text.
        frames: Length of the encoder's output for speech.
        dtype: Of the past and of speech.
    """

    layers: int
    heads: int
    size: int
    vocabulary: int
    features: tuple[int, int] | None
    frames: int | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Seq2SeqInputs:
        """Reads them off a model, by running its encoder on a sample.

        Raises:
            ConfigError: its inputs are neither token ids nor speech of a known length.
        """
        step: Any = encoder_step(model)
        held: Any = model
        vocabulary = Limits.of(model).vocabulary
        features = None
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if held.main_input_name == "input_features" and hasattr(held.config, "num_mel_bins"):
            # Two convolutions, the second with a stride of 2, before the positions.
            features = (held.config.num_mel_bins, 2 * held.config.max_source_positions)
            sample = {"input_features": torch.zeros(1, *features, dtype=dtype)}
        elif held.main_input_name == "input_ids":
            ids = torch.zeros(1, 2, dtype=torch.int64)
            sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            raise ConfigError(
                f"no inputs are known for the encoder of {type(model).__name__}, which takes "
                f"{held.main_input_name}.",
                hint="Export its parts with export_onnx.",
            )
        if vocabulary is None:
            raise ConfigError(f"{type(model).__name__} has no config.vocab_size.")
        with torch.no_grad():
            present = evaluation_copy(step)(**sample)["present"]
        key = present[0]["encoder"]["key"]
        frames = key.shape[2] if features is not None else None
        return cls(len(present), key.shape[1], key.shape[3], vocabulary, features, frames, dtype)

    def encoder(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of the encoder; all rows of text but the first padded on the right."""
        rows = sizes[BATCH]
        if self.features is not None:
            made = torch.randn(rows, *self.features, generator=generator)
            return {"input_features": made.to(self.dtype)}
        shape = (rows, sizes[SOURCE])
        ids = torch.randint(self.vocabulary, shape, generator=generator)
        return {"input_ids": ids, "attention_mask": _right_padded(*shape, generator)}

    def __call__(self, sizes: dict[str, int], generator: torch.Generator) -> dict[str, Any]:
        """Random inputs of the decoder."""
        rows = sizes[BATCH]
        source = sizes[SOURCE] if self.frames is None else self.frames
        shape = (rows, sizes[SEQUENCE])
        made: dict[str, Any] = {
            "decoder_input_ids": torch.randint(self.vocabulary, shape, generator=generator)
        }
        if self.features is None:
            made["encoder_attention_mask"] = _right_padded(rows, source, generator)
        made["past_key_values"] = [
            {
                part: {
                    name: torch.randn(rows, self.heads, length, self.size, generator=generator).to(
                        self.dtype
                    )
                    for name in ("key", "value")
                }
                for part, length in (("decoder", sizes[PAST]), ("encoder", source))
            }
            for _ in range(self.layers)
        ]
        return made

    @property
    def encoder_shapes(self) -> dict[str, Any]:
        """Which axes of the encoder's inputs vary, in torch.export's form."""
        if self.features is not None:
            return {"input_features": {0: BATCH}}
        return {name: {0: BATCH, 1: SOURCE} for name in ("input_ids", "attention_mask")}

    @property
    def decoder_shapes(self) -> dict[str, Any]:
        """Which axes of the decoder's inputs vary, in torch.export's form."""
        source = {0: BATCH, 2: SOURCE} if self.frames is None else {0: BATCH}
        lengths = {"decoder": {0: BATCH, 2: PAST}, "encoder": source}
        shapes: dict[str, Any] = {"decoder_input_ids": {0: BATCH, 1: SEQUENCE}}
        if self.features is None:
            shapes["encoder_attention_mask"] = {0: BATCH, 1: SOURCE}
        shapes["past_key_values"] = [
            {part: {"key": axes, "value": axes} for part, axes in lengths.items()}
            for _ in range(self.layers)
        ]
        return shapes


def _right_padded(rows: int, length: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def seq2seq_whole(
    folder: Path, model: nn.Module, tolerance: Tolerance | None, seed: int
) -> ValidationReport:
    """The encoder's result into the decoder, token after token, against the plain model."""
    from gauge_ext.export.language.generate import OnnxGenerator

    inputs = Seq2SeqInputs.of(unwrap(model))
    generator = torch.Generator().manual_seed(seed + 1)
    reference = evaluation_copy(model)
    rows, length = 2, sum(_PIECES)
    given = inputs.encoder({BATCH: rows, SOURCE: 8}, generator)
    ids = torch.randint(inputs.vocabulary, (rows, length), generator=generator)
    with torch.no_grad():
        expected = reference(**given, decoder_input_ids=ids, use_cache=False).logits
    _, runtime = open_session(folder / DECODER)
    source, mask = next(iter(given.values())), given.get("attention_mask")
    session = OnnxGenerator(folder).decoder(source, attention_mask=mask)
    found = [torch.from_numpy(session.feed(piece.numpy())) for piece in ids.split(_PIECES, 1)]
    bar = tolerance or usual_tolerance(float_dtypes([*reference.parameters(), expected]))
    difference = compare("logits", expected, torch.cat(found, 1), bar, logits=True)
    name = "encoder, then a loop of " + ", ".join(map(str, _PIECES)) + " tokens"
    case = CaseResult(name, {BATCH: rows, SEQUENCE: length}, (difference,))
    return ValidationReport(folder / DECODER, runtime, (case,))
