"""What a user gives to calibrate a model that generates: prompts, row by row, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.language.choose import Ids
from gauge_ext.export.language.loop import Sample
from gauge_ext.export.trace.cases import Limits

STEPS = 16  # tokens that the graphs write after each prompt


class CalibrationError(ConfigError):
    """What was given to calibrate a model on is nothing that it can run on."""


@dataclass(frozen=True)
class Prompt:
    """One row of a calibration set, without padding.

    Attributes:
        inputs: Token ids ``(1, length)``, or an encoder's features.
        first: The first tokens of an encoder-decoder model's output ``(1, length)``; else None.
        steps: How many tokens the graphs are to write after it.
    """

    inputs: NDArray[Any]
    first: Ids | None
    steps: int


def prompts_of(
    model: nn.Module, sample: Sample, calibration: Iterable[Mapping[str, Any]]
) -> list[Prompt]:
    """The rows of calibration sets, each on its own.

    Args:
        model: A model that generates.
        sample: Inputs of the right kind and shape.
        calibration: Sets of ``input_ids`` and, where rows are padded, ``attention_mask``; for an
            encoder-decoder model these are the encoder's (of speech ``input_features``), and
            ``decoder_input_ids`` may say how the output begins.

    Raises:
        CalibrationError: a set lacks its tokens or has inputs of other names, a prompt is empty or
            longer than the model's positions, or a token is not in its vocabulary.
    """
    held: Any = model
    config = held.config.get_text_config()
    vocabulary = Limits.of(model).vocabulary or 0
    longest = getattr(config, "max_position_embeddings", None)
    written = getattr(config, "max_target_positions", None) or longest
    coded, speech = held.config.is_encoder_decoder, sample.source.is_floating_point()
    main = "input_features" if speech else "input_ids"
    more = [] if speech else ["attention_mask"]
    more += ["decoder_input_ids"] if coded else []
    found = []
    for number, given in enumerate(calibration, 1):
        where = f"calibration set {number}"
        if main not in given or set(given) - {main, *more}:
            raise CalibrationError(
                f"{where} has {', '.join(sorted(given)) or 'no arrays'}, expected {main} and, "
                f"where needed, {' and '.join(more)}.",
                hint="Give prompts alone: the caches come from running them.",
            )
        if speech:
            rows = _features(given[main], tuple(sample.source.shape[1:]), where)
        else:
            rows = _rows(given, main, where)
            if "attention_mask" in given:
                rows = _unpadded(rows, _rows(given, "attention_mask", where), where)
            _require_known(rows, main, vocabulary, longest, where)
        starts: list[Ids] = []
        if "decoder_input_ids" in given:
            starts = _rows(given, "decoder_input_ids", where)
            _require_known(starts, "decoder_input_ids", vocabulary, written, where)
        elif coded:
            starts = [np.array([_start(held)], np.int64)] * len(rows)
        if coded and len(starts) != len(rows):
            raise CalibrationError(
                f"{where} has {len(rows)} rows of {main} and {len(starts)} of decoder_input_ids."
            )
        for index, row in enumerate(rows):
            first = starts[index][None] if coded else None
            length = row.size if first is None else first.size
            steps = STEPS if written is None else min(STEPS, written - length + 1)
            found.append(Prompt(row[None], first, steps))
    return found


def _rows(given: Mapping[str, Any], name: str, where: str) -> list[Ids]:
    try:
        rows = [np.asarray(row) for row in given[name]]
    except (TypeError, ValueError):
        rows = []
    if not rows or any(r.ndim != 1 or r.size == 0 or r.dtype.kind not in "iu" for r in rows):
        raise CalibrationError(
            f"{where}: {name} must be rows of integers, (batch, length), with at least one in "
            f"each, got {[f'{r.dtype} {r.shape}' for r in rows[:3]] or repr(given[name])[:60]}.",
            hint="A single text is a batch of one: [ids].",
        )
    return [row.astype(np.int64) for row in rows]


def _unpadded(rows: list[Ids], masks: list[Ids], where: str) -> list[Ids]:
    """The rows without what their masks hide at either end."""
    if [row.size for row in rows] != [mask.size for mask in masks]:
        raise CalibrationError(f"{where}: attention_mask and input_ids have rows of other lengths.")
    found = []
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True), 1):
        (seen,) = np.nonzero(mask)
        if seen.size == 0:
            raise CalibrationError(f"{where}: row {number} is empty: its attention_mask is all 0.")
        if seen[-1] - seen[0] + 1 != seen.size:
            raise CalibrationError(
                f"{where}: the attention_mask of row {number} has a 0 between tokens.",
                hint="Pad at the ends.",
            )
        found.append(row[seen])
    return found


def _require_known(
    rows: list[Ids], name: str, vocabulary: int, longest: int | None, where: str
) -> None:
    for number, row in enumerate(rows, 1):
        if odd := [int(token) for token in row if not 0 <= token < vocabulary]:
            raise CalibrationError(
                f"{where}: row {number} of {name} has the token {odd[0]}, and the model's "
                f"vocabulary is 0 to {vocabulary - 1}.",
                hint="Use the tokenizer that belongs to the model.",
            )
        if longest is not None and row.size > longest:
            raise CalibrationError(
                f"{where}: row {number} of {name} has {row.size} tokens, and the model has "
                f"{longest} positions.",
                hint="Cut it into shorter prompts.",
            )


def _features(value: Any, shape: tuple[int, ...], where: str) -> list[NDArray[Any]]:
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape[1:] != shape or not len(array):
        raise CalibrationError(
            f"{where}: input_features must be floats (batch, {', '.join(map(str, shape))}), got "
            f"{array.dtype} {array.shape}.",
            hint="The processor that belongs to the model makes them.",
        )
    if not np.isfinite(array).all():
        raise CalibrationError(f"{where}: input_features holds NaN or infinity.")
    return list(array.astype(np.float32))


def _start(model: Any) -> int:
    for config in (getattr(model, "generation_config", None), model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise CalibrationError(
        "the model's configs name no decoder_start_token_id, so no output can begin.",
        hint="Give decoder_input_ids beside the calibration's prompts.",
    )
