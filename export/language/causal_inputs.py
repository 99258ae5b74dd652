"""Inputs of a decoder-only model's step, of any sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.language.cached import cache_shapes, takes_positions
from gauge_ext.export.trace.cases import Limits

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"


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
