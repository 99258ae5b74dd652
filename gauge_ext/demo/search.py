"""Searching with what a user would ship: the ONNX file and the tokenizer, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.demo.corpus import words_of
from gauge_ext.demo.text import INSTALL, TextTokenizer
from gauge_ext.errors import GaugeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

_GROUP = 32


@dataclass(frozen=True)
class Hit:
    """A name that was found and its cosine with the query."""

    name: str
    score: float


class OnnxEncoder:
    """Runs an exported ``SentenceEncoder`` in onnxruntime on the CPU.

    Args:
        model: The ONNX file.
        tokenizer: Its tokenizer.
        threads: Threads for one run; None: onnxruntime's choice, all cores.

    Raises:
        GaugeError: onnxruntime is not installed.
    """

    def __init__(self, model: Path, tokenizer: TextTokenizer, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise GaugeError(
                f"the demo needs onnxruntime, which cannot be imported: {error}.", hint=INSTALL
            ) from error
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session: Any = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = tokenizer

    def run(
        self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]
    ) -> Vectors:
        """Returns (batch, d) unit vectors of (batch, sequence) tokens and their mask."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors: Vectors = self._session.run(None, feeds)[0]
        return vectors

    def encode(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> Vectors:
        """Returns (texts, d) unit vectors in the order of ``texts``, of which there is one or more.

        ``progress`` is called with the number of texts done and of all.
        """
        import numpy as np

        rows: list[int] = []
        parts: list[Vectors] = []
        for group in self._tokenizer.groups(texts, _GROUP):
            parts.append(self.run(np.array(group.input_ids), np.array(group.attention_mask)))
            rows += group.rows
            if progress is not None:
                progress(len(rows), len(texts))
        return np.concatenate(parts)[np.argsort(rows)]


class NameIndex:
    """The vectors of all names, ready to be searched.

    Args:
        encoder: Encodes names and queries.
        names: Qualified names.
        progress: Called with the number of names done and of all.
    """

    def __init__(
        self,
        encoder: OnnxEncoder,
        names: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._encoder = encoder
        self.names = list(names)
        self.vectors = encoder.encode([words_of(name) for name in self.names], progress)

    def search(self, query: str, count: int = 3) -> list[Hit]:
        """Returns the ``count`` names nearest to ``query``, the best first."""
        import numpy as np

        scores = self.vectors @ self._encoder.encode([query])[0]
        return [Hit(self.names[i], float(scores[i])) for i in np.argsort(-scores)[:count]]
