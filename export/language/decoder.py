"""A decoder's graph with its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.export.language.choose import Ids, Logits
from gauge_ext.export.language.graphs import DTYPES, Adapter, Feeds, FolderGraph


class DecoderSession:
    """One decoder graph with its cache: feed tokens, get logits, and the past is kept.

    Args:
        graph: A graph with ``past_key_values.*`` inputs and ``present.*`` outputs.
        batch: How many rows.
        fixed: Inputs that stay the same at every step, such as the encoder's keys and values.
        adapter: Which adapter, at every step; see :meth:`gauge_ext.export.AdapterSession.run`.

    Attributes:
        length: How many tokens each row's past holds, padding included.
    """

    def __init__(
        self,
        graph: FolderGraph,
        batch: int,
        fixed: Mapping[str, NDArray[Any]] | None = None,
        adapter: Adapter = None,
    ) -> None:
        self._graph, self._adapter, self._inputs = graph, adapter, graph.inputs
        self._fixed = {name: array for name, array in (fixed or {}).items() if name in self._inputs}
        self._past: Feeds = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values.") and name not in self._fixed:
                _, heads, _, size = value.shape
                self._past[name] = np.zeros((batch, heads, 0, size), DTYPES[value.type])
        self._mask = np.zeros((batch, 0), np.int64)

    @property
    def length(self) -> int:
        """How many tokens each row's past holds, padding included."""
        return self._mask.shape[1]

    def feed(self, tokens: Ids, mask: Ids | None = None) -> Logits:
        """Runs the graph on more tokens.

        Args:
            tokens: ``(batch, new)``.
            mask: ``(batch, new)``, 0 where a token is padding; by default none is.

        Returns:
            Logits ``(batch, new, vocabulary)``.
        """
        new = np.ones_like(tokens) if mask is None else mask
        self._mask = np.concatenate([self._mask, new], axis=1)
        ids = "decoder_input_ids" if "decoder_input_ids" in self._inputs else "input_ids"
        feeds: Feeds = {ids: tokens, **self._past, **self._fixed}
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = self._mask
        if "position_ids" in self._inputs:
            # Padding on the left does not count; its own position is of no consequence.
            positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -tokens.shape[1] :]
        results = self._graph.run(feeds, self._adapter)
        for name in self._past:
            self._past[name] = results["present." + name.removeprefix("past_key_values.")]
        logits: Logits = results["logits"]
        return logits
