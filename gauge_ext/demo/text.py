"""Text to token numbers, without torch and without transformers: the Rust tokenizer alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gauge_ext.errors import GaugeError

INSTALL = 'Run: pip install "gauge-ext[demo]" (in a clone: pip install -e ".[demo]").'


@dataclass(frozen=True)
class TokenGroup:
    """Texts of about one length, padded to the longest of them.

    Attributes:
        rows: (n,) positions of these texts in the list that was tokenized.
        input_ids: (n, sequence), 0 where there is no token.
        attention_mask: (n, sequence), 1 where there is a token.
    """

    rows: list[int]
    input_ids: list[list[int]]
    attention_mask: list[list[int]]


class TextTokenizer:
    """Reads a ``tokenizer.json`` and pads in groups of similar length.

    A sentence of the corpus has 14 tokens on average and 68 at most, a name 9: padding a whole
    batch to its longest text would spend most of the time on padding. The encoder ignores padding,
    so the groups change nothing but the time.

    Args:
        path: The ``tokenizer.json``.
        max_tokens: Longer texts are cut.

    Raises:
        GaugeError: The package tokenizers is missing, or the file is none of its.
    """

    def __init__(self, path: Path, max_tokens: int = 64) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise GaugeError(
                f"the demo needs the package tokenizers, which cannot be imported: {error}.",
                hint=INSTALL,
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception, for a missing file too
            raise GaugeError(f"cannot read a tokenizer from {path}: {error}.") from error
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()

    def groups(self, texts: Sequence[str], size: int) -> Iterator[TokenGroup]:
        """Tokenizes ``texts``; yields groups of at most ``size``, the short ones first."""
        encodings = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(texts)), key=lambda row: len(encodings[row].ids))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            kept = [encodings[row].ids for row in rows]
            longest = len(kept[-1])
            yield TokenGroup(
                rows=rows,
                input_ids=[ids + [0] * (longest - len(ids)) for ids in kept],
                attention_mask=[[1] * len(ids) + [0] * (longest - len(ids)) for ids in kept],
            )
