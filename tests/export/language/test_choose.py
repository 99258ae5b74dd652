"""Each step of the choice against transformers' own processors, and the drawing against chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gauge_ext.export.language.choose import choose, softmax
from gauge_ext.export.language.sampling import Sampling

transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process  # noqa: E402


@pytest.fixture
def logits() -> np.ndarray:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).mul(3).numpy()


def drawn(logits: np.ndarray, sampling: Sampling, rounds: int) -> np.ndarray:
    """How often each token of the first row comes."""
    random = np.random.default_rng(0)
    rows = np.repeat(logits[:1], rounds, axis=0)
    none = np.zeros((rounds, 0), np.int64)
    chosen = choose(rows, none, sampling, random, first=True)
    return np.bincount(chosen, minlength=logits.shape[1]) / rounds


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"top_k": 5}, [logits_process.TopKLogitsWarper(5)]),
        ({"top_k": 0, "top_p": 0.7}, [logits_process.TopPLogitsWarper(0.7)]),
        ({"top_k": 0, "temperature": 2.5}, [logits_process.TemperatureLogitsWarper(2.5)]),
        (
            {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
            [
                logits_process.TemperatureLogitsWarper(0.7),
                logits_process.TopKLogitsWarper(9),
                logits_process.TopPLogitsWarper(0.9),
            ],
        ),
    ],
)
def test_the_distribution(options, processors, logits):
    scores = torch.from_numpy(logits[:1].copy())
    for processor in processors:
        scores = processor(torch.zeros(1, 1, dtype=torch.long), scores)
    expected = scores.softmax(-1)[0].numpy()
    rounds = 4000
    found = drawn(logits, Sampling(do_sample=True, **options), rounds)
    assert set(np.nonzero(found)[0]) <= set(np.nonzero(expected)[0])
    # Five standard deviations of a share out of so many rounds.
    assert np.abs(found - expected).max() < 5 * 0.5 / np.sqrt(rounds)


def test_the_penalty(logits):
    so_far = np.array([[1, 2, 2], [3, 3, 3], [0, 1, 39]])
    expected = logits_process.RepetitionPenaltyLogitsProcessor(3.0)(
        torch.from_numpy(so_far), torch.from_numpy(logits.copy())
    )
    found = choose(
        logits, so_far, Sampling(repetition_penalty=3.0), np.random.default_rng(), first=False
    )
    assert list(found) == expected.argmax(-1).tolist()


def test_suppressed_tokens(logits):
    best = logits.argmax(-1)
    none = np.zeros((3, 0), np.int64)
    random = np.random.default_rng()
    always = Sampling(suppress_tokens=tuple(map(int, best)))
    at_first = Sampling(begin_suppress_tokens=tuple(map(int, best)))
    ranked = logits.copy()
    ranked[:, best] = -np.inf
    for sampling in (always, at_first):
        assert list(choose(logits, none, sampling, random, first=True)) == list(ranked.argmax(-1))
    assert list(choose(logits, none, at_first, random, first=False)) == list(best)
    assert list(choose(logits, none, always, random, first=False)) == list(ranked.argmax(-1))


def test_softmax_of_large_numbers():
    found = softmax(np.array([[1000.0, 1000.0, -np.inf]], np.float32))
    assert found.tolist() == [[0.5, 0.5, 0.0]]
