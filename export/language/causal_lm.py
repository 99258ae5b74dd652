"""Decoder-only language models as one graph with a key-value cache, proven in a loop."""

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
from gauge_ext.export.language.cached import cache_shapes, causal_step, takes_positions
from gauge_ext.export.language.genai import genai_config
from gauge_ext.export.language.model_folder import (
    ModelReport,
    placed,
    report_of,
    settle,
    write_manifest,
    write_settings,
)
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.report import CaseResult, ValidationReport
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

GRAPH = "model.onnx"
BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
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
    opset: int = 20,
    external_data: bool | None = None,
    validate: bool = True,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Merges a copy of a decoder-only language model and writes it as a graph with a cache.

    ``model.onnx`` takes ``input_ids (batch_size, sequence_length)``, ``attention_mask (batch_size,
    past_sequence_length + sequence_length)``, ``position_ids`` where the model takes them, and
    ``past_key_values.N.key`` and ``.value (batch_size, key/value heads, past_sequence_length, head
    size)``; it gives ``logits`` for every new token and ``present.N.key`` and ``.value``, the past
    with the new tokens behind it. Heads are those of the cache: fewer than the queries' where the
    model groups them. A past of length 0 is a prefill. A tied output layer is stored once.

    Beside it go ``config.json``, ``generation_config.json``, ``genai_config.json`` for
    onnxruntime-genai, and the tokenizer's files of ``source``.

    Validation runs prefill, decode of 1 and of 4 tokens against the unmerged model, and a prefill
    with left padding, one token and four tokens in a row against the plain model without a cache.

    Args:
        model: A model of transformers that generates, with adapters or without: Llama, Qwen,
            Mistral, Gemma, GPT-2 and others whose cache is one key and one value for each layer.
        folder: The folder to write; it must not exist or be empty.
        source: The folder that the model was loaded from, for its tokenizer.
        opset: See :func:`gauge_ext.export.export_onnx`; so are the following.
        external_data: Whether the weights go into a file of their own, ``model.onnx.data``.
        validate: Whether to run the graph before the folder is put in place.
        tolerance: How far onnxruntime may be from torch; by default by dtype.
        seed: Of the inputs that it runs on.
        provenance: More metadata, text to text.
        progress: Called with what is being done and the share done.

    Returns:
        What was written, and what validation found.

    Raises:
        ConfigError: this is no such model.
        ExportError: torch cannot translate it, its cache is of another kind, onnxruntime cannot
            load the result, or a package is missing.
        ValidationError: onnxruntime and torch disagree.
        WriteError: the folder cannot be written.
    """
    require_packages()
    folder = Path(folder)
    inner = unwrap(model)
    inputs = CausalInputs.of(inner)
    tell = progress or (lambda what, share: None)
    with staged_folder(folder) as draft:
        report = export_onnx(
            causal_step(inner),
            inputs(_EXAMPLE, torch.Generator().manual_seed(seed)),
            draft / GRAPH,
            dynamic_shapes=inputs.dynamic_shapes,
            opset=opset,
            external_data=external_data,
            validate=False,
            provenance={"task": "text-generation", **(provenance or {})},
            progress=lambda what, share: tell(what, 0.6 * share),
        )
        found, whole = None, None
        if validate:
            found, whole = validate_causal_lm(
                draft,
                inner,
                tolerance=tolerance,
                seed=seed,
                progress=lambda what, share: tell(what, 0.6 + 0.4 * share),
            )
            for judged in (found, whole):
                if not judged.passed:
                    raise DisagreementError(placed(judged, folder))
        graphs = [settle(report, draft, found, whole)]
        genai = genai_config(inner, report.inputs, report.outputs, GRAPH)
        write_settings(
            inner, draft, None if source is None else Path(source), {"genai_config.json": genai}
        )
        write_manifest(draft, "text-generation")
        return report_of(draft, folder, "text-generation", graphs, whole)


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
    (steps,) = causal_subjects(Path(folder), model, seed)
    return (
        steps.validate(tolerance=tolerance, seed=seed, progress=progress),
        causal_whole(Path(folder), model, tolerance, seed),
    )


def causal_subjects(folder: Path, model: nn.Module, seed: int) -> list[Subject]:
    """The graph of a folder, and the step of torch that it has to equal.

    Raises:
        ConfigError: this is another kind of model.
        ExportError: its cache is of another kind.
    """
    inner = unwrap(model)
    inputs = CausalInputs.of(inner)
    longest = min(32, (Limits.of(inner).positions or 33) - 1)
    return [
        Subject(
            folder / GRAPH,
            causal_step(inner),
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
    ]


@dataclass(frozen=True)
class CausalInputs:
    """Makes inputs of a :func:`~gauge_ext.export.language.cached.causal_step` for given sizes.

    Attributes:
        layers: Heads and head size of each layer's key and value.
        vocabulary: Token ids are below this.
        positions: Whether the step takes position ids.
        dtype: Of the past.
    """

    layers: tuple[dict[str, tuple[int, int]], ...]
    vocabulary: int
    positions: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> CausalInputs:
        """Reads them off a model.

        Raises:
            ConfigError: its vocabulary is unknown, or it is no generating model of transformers.
            ExportError: its cache is of another kind.
        """
        layers = tuple(cache_shapes(model))
        vocabulary = Limits.of(model).vocabulary
        if vocabulary is None:
            raise ConfigError(f"{type(model).__name__} has no config.vocab_size.")
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return cls(layers, vocabulary, takes_positions(model), dtype)

    def __call__(self, sizes: dict[str, int], generator: torch.Generator) -> dict[str, Any]:
        """Random ids and a random past; all rows but the first padded on the left at random."""
        rows, new, past = sizes[BATCH], sizes[SEQUENCE], sizes[PAST]
        mask = left_padded(rows, past + new, generator)
        ids = torch.randint(self.vocabulary, (rows, new), generator=generator)
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.positions:
            made["position_ids"] = positions_of(mask)[:, past:]
        made["past_key_values"] = [
            {
                name: torch.randn(rows, heads, past, size, generator=generator).to(self.dtype)
                for name, (heads, size) in layer.items()
            }
            for layer in self.layers
        ]
        return made

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        """Which axes vary, in torch.export's form."""
        new = {0: BATCH, 1: SEQUENCE}
        shapes: dict[str, Any] = {
            "input_ids": new,
            "attention_mask": {0: BATCH, 1: "total_sequence_length"},
            "position_ids": new,
            "past_key_values": [{key: {0: BATCH, 2: PAST} for key in s} for s in self.layers],
        }
        if not self.positions:
            del shapes["position_ids"]
        return shapes


def left_padded(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """A mask ``(rows, length)`` of zeros and then ones; the first row has no zeros."""
    padding = torch.randint(0, max(1, length - 1), (rows, 1), generator=generator)
    padding[0] = 0
    return (torch.arange(length) >= padding).long()


def positions_of(mask: Tensor) -> Tensor:
    """Position ids of a left-padded mask; those of padding are 0, and of no consequence."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _visible(name: str, output: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """What a step says of tokens that are not padding: a row that sees nothing is undefined."""
    mask = given["attention_mask"].bool()
    if name == "logits":
        return output[mask[:, -output.shape[1] :]]
    return output.transpose(1, 2)[mask]


def causal_whole(
    folder: Path, model: nn.Module, tolerance: Tolerance | None, seed: int
) -> ValidationReport:
    """The graph in a loop against the plain model, which sees all tokens and has no cache.

    Prefill with left padding, one token, four tokens, each on the present of the one before.
    """
    from gauge_ext.export.language.generate import DecoderSession

    path, inputs = folder / GRAPH, CausalInputs.of(unwrap(model))
    reference = evaluation_copy(model)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, length = 3, sum(_PIECES)
    ids = torch.randint(inputs.vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : _PIECES[0] - 1], mask[2, :2] = 0, 0
    given = {"position_ids": positions_of(mask)} if inputs.positions else {}
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
    session, runtime = open_session(path)
    decoder = DecoderSession(session, rows)
    found = [
        torch.from_numpy(decoder.feed(tokens.numpy(), seen.numpy()))
        for tokens, seen in zip(ids.split(_PIECES, 1), mask.split(_PIECES, 1), strict=True)
    ]
    bar = tolerance or usual_tolerance(float_dtypes([*reference.parameters(), expected]))
    seen = mask.bool()
    difference = compare("logits", expected[seen], torch.cat(found, 1)[seen], bar, logits=True)
    name = "loop of " + ", ".join(map(str, _PIECES)) + " tokens, left padding"
    case = CaseResult(name, {BATCH: rows, SEQUENCE: length}, (difference,))
    return ValidationReport(path, runtime, (case,))
