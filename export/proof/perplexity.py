"""The perplexity of a text, in torch and in a graph that generates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.language.generate import OnnxGenerator
from gauge_ext.export.language.loop import variants
from gauge_ext.export.language.prompt import tokenizer_of


@dataclass(frozen=True)
class Perplexity:
    """The same text through both.

    Attributes:
        tokens: How many tokens it has.
        torch: Perplexity of the torch model.
        onnx: Perplexity of the graph.
        limit: The largest |onnx / torch - 1| allowed.
    """

    tokens: int
    torch: float
    onnx: float
    limit: float = 1e-3

    @property
    def difference(self) -> float:
        """Perplexity of the graph over that of torch, less one."""
        return self.onnx / self.torch - 1.0

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return abs(self.difference) <= self.limit


def text_perplexity(folder: Path, model: nn.Module, text: str, *, window: int = 512) -> Perplexity:
    """The perplexity of a text in torch and in the graph of a folder, with the folder's tokenizer.

    Raises:
        ConfigError: the folder has no tokenizer, or the text is too short.
    """
    tokens = torch.tensor(_tokenize(folder, text), dtype=torch.int64)
    generator = OnnxGenerator(folder)
    *_, (_, reference, adapter) = variants(generator, model)
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    window = min(window, positions or window)
    found = generator.perplexity(tokens, window=window, adapter=adapter)
    total, count = 0.0, 0
    for piece in tokens.split(window):
        if len(piece) < 2:
            continue
        with torch.no_grad():
            logits = reference(input_ids=piece[None], use_cache=False).logits[0, :-1]
        chances = logits.double().log_softmax(-1)
        total -= float(chances.gather(-1, piece[1:, None]).sum())
        count += len(piece) - 1
    return Perplexity(len(tokens), float(torch.tensor(total / count).exp()), found)


def _tokenize(folder: Path, text: str) -> list[int]:
    ids = [int(token) for token in tokenizer_of(folder)(text)["input_ids"]]
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens, and at least 2 are needed.")
    return ids
