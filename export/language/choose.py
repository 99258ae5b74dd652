"""The next token out of a row of logits, with numpy alone and in transformers' order of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.export.language.sampling import Sampling

Ids = NDArray[np.int64]
Logits = NDArray[np.floating[Any]]


def choose(
    logits: Logits, so_far: Ids, sampling: Sampling, random: np.random.Generator, *, first: bool
) -> Ids:
    """The next token of each row.

    Args:
        logits: ``(batch, vocabulary)``.
        so_far: ``(batch, length)``, the tokens of each row, for the repetition penalty.
        sampling: How to choose.
        random: Where chance comes from.
        first: Whether these are the first new tokens.

    Returns:
        ``(batch,)``.
    """
    scores = logits.astype(np.float32, copy=True)
    if sampling.repetition_penalty != 1.0:
        there = np.take_along_axis(scores, so_far, axis=1)
        factor = np.float32(sampling.repetition_penalty)
        np.put_along_axis(scores, so_far, np.where(there < 0, there * factor, there / factor), 1)
    banned = sampling.suppress_tokens + (sampling.begin_suppress_tokens if first else ())
    scores[:, list(banned)] = -np.inf
    if not sampling.do_sample:
        return np.asarray(scores.argmax(axis=-1), dtype=np.int64)
    probabilities = _filtered(scores / np.float32(sampling.temperature), sampling)
    drawn = [random.choice(row.size, p=row) for row in probabilities]
    return np.asarray(drawn, dtype=np.int64)


def _filtered(scores: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities ``(batch, vocabulary)`` after top-k and top-p."""
    if 0 < sampling.top_k < scores.shape[-1]:
        least = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    probabilities = softmax(scores)
    if sampling.top_p < 1.0:
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, -1)
        # A token stays as long as those before it have not reached top_p together.
        ranked[np.cumsum(ranked, -1) - ranked >= sampling.top_p] = 0.0
        np.put_along_axis(probabilities, order, ranked, -1)
        probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities


def softmax(scores: Logits) -> NDArray[np.float64]:
    """Along the last axis, in float64: the sum is 1 as closely as numpy's choice asks for."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
