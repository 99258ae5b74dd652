"""The study's second task: all-MiniLM-L6-v2 learns to find names by what their docstrings say.

The demo's data and loss. Adapters sit on the last two of six layers: the four below are frozen, so
their output is computed once for each text, and a run costs a third of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gauge_ext.demo.corpus import Pair, split_pairs, stdlib_pairs, words_of
from gauge_ext.demo.encoder import SentenceEncoder, load_encoder, model_folder
from gauge_ext.demo.metrics import retrieval
from gauge_ext.demo.text import TextTokenizer
from gauge_ext.demo.train import info_nce

BATCH, FROZEN, TEMPERATURE, MAX_TOKENS = 16, 4, 0.05, 32
TRAIN, VALIDATION, TEST = 1024, 256, 384


class UpperLayers(nn.Module):
    """The layers above the frozen ones, and the mean that makes a unit vector of their output."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, texts: list[Tensor]) -> Tensor:
        """Return (texts, d) unit vectors of what the frozen layers gave, (length, d) each."""
        mask = pad_sequence([t.new_ones(len(t), dtype=torch.bool) for t in texts], batch_first=True)
        hidden = pad_sequence(texts, batch_first=True)
        for layer in self.layers:
            hidden = layer(hidden, mask[:, None, None, :])
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


class SearchTask:
    """Sentences of docstrings, each against the names of its batch."""

    score_name = "mean reciprocal rank"

    def __init__(self) -> None:
        folder = model_folder()
        encoder = load_encoder(folder)
        tokenizer = TextTokenizer(folder / "tokenizer.json", MAX_TOKENS)
        split = split_pairs(stdlib_pairs(), TRAIN + VALIDATION + TEST, seed=0)
        parts = split_pairs(split.held_out, VALIDATION + TEST, seed=1)
        held_out = split_pairs(parts.held_out, TEST, seed=2)
        self._train = _lower(encoder, tokenizer, parts.train)
        self._held_out = {
            "validation": _lower(encoder, tokenizer, held_out.train),
            "test": _lower(encoder, tokenizer, held_out.held_out),
        }
        self._base = UpperLayers(encoder.bert.encoder.layer[FROZEN:]).eval()

    def model(self) -> nn.Module:
        """A base of one's own."""
        return copy.deepcopy(self._base)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss on a batch that is drawn."""
        rows = torch.randperm(TRAIN, generator=generator)[:BATCH].tolist()
        sentences, names = ([side[row] for row in rows] for side in self._train)
        return info_nce(model(sentences), model(names), TEMPERATURE)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> tuple[float, float]:
        """The loss, every name of the part a candidate, and the mean reciprocal rank."""
        sentences, names = (_vectors(model, side) for side in self._held_out[part])
        loss = info_nce(sentences, names, TEMPERATURE)
        if not torch.isfinite(loss):
            return float("nan"), float("nan")
        return float(loss), retrieval(sentences, names, torch.arange(len(names))).mrr


def _vectors(model: nn.Module, texts: list[Tensor]) -> Tensor:
    """Encode in groups of like length, as padding costs time."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    groups = [order[start : start + 32] for start in range(0, len(order), 32)]
    vectors = torch.cat([model([texts[row] for row in group]) for group in groups])
    return vectors[torch.tensor(order).argsort()]


@torch.no_grad()
def _lower(
    encoder: SentenceEncoder, tokenizer: TextTokenizer, pairs: list[Pair]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the frozen layers make of the sentences and of the names."""
    texts = [pair.sentence for pair in pairs] + [words_of(pair.name) for pair in pairs]
    found: dict[int, Tensor] = {}
    for group in tokenizer.groups(texts, 32):
        mask = torch.tensor(group.attention_mask)
        hidden = encoder.bert(
            input_ids=torch.tensor(group.input_ids), attention_mask=mask, output_hidden_states=True
        ).hidden_states[FROZEN]
        for row, states, length in zip(group.rows, hidden, mask.sum(1).tolist(), strict=True):
            found[row] = states[:length].clone()
    ordered = [found[row] for row in range(len(texts))]
    return ordered[: len(pairs)], ordered[len(pairs) :]
