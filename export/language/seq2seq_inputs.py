"""Inputs of an encoder's and a decoder's step, of any sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError
from gauge_ext.export.language.cached import encoder_step
from gauge_ext.export.language.causal_inputs import BATCH, PAST, SEQUENCE
from gauge_ext.export.trace.cases import Limits
from gauge_ext.export.validate import evaluation_copy

SOURCE = "encoder_sequence_length"


@dataclass(frozen=True)
class Seq2SeqInputs:
    """Makes inputs of both graphs for given sizes.

    Attributes:
        layers: How many layers the decoder has.
        heads: Of its attention.
        size: Of each head.
        vocabulary: Token ids are below this.
        features: Shape of one sample of speech, ``(mel bins, frames)``; None for text.
        frames: Length of the encoder's output for speech.
        dtype: Of the past and of speech.
    """

    layers: int
    heads: int
    size: int
    vocabulary: int
    features: tuple[int, int] | None
    frames: int | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Seq2SeqInputs:
        """Reads them off a model, by running its encoder on a sample.

        Raises:
            ConfigError: its inputs are neither token ids nor speech of a known length.
        """
        step: Any = encoder_step(model)
        held: Any = model
        vocabulary = Limits.of(model).vocabulary
        features = None
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if held.main_input_name == "input_features" and hasattr(held.config, "num_mel_bins"):
            # Two convolutions, the second with a stride of 2, before the positions.
            features = (held.config.num_mel_bins, 2 * held.config.max_source_positions)
            sample = {"input_features": torch.zeros(1, *features, dtype=dtype)}
        elif held.main_input_name == "input_ids":
            ids = torch.zeros(1, 2, dtype=torch.int64)
            sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            raise ConfigError(
                f"no inputs are known for the encoder of {type(model).__name__}, which takes "
                f"{held.main_input_name}.",
                hint="Export its parts with export_onnx.",
            )
        if vocabulary is None:
            raise ConfigError(f"{type(model).__name__} has no config.vocab_size.")
        with torch.no_grad():
            present = evaluation_copy(step)(**sample)["present"]
        key = present[0]["encoder"]["key"]
        frames = key.shape[2] if features is not None else None
        return cls(len(present), key.shape[1], key.shape[3], vocabulary, features, frames, dtype)

    def encoder(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of the encoder; all rows of text but the first padded on the right."""
        rows = sizes[BATCH]
        if self.features is not None:
            made = torch.randn(rows, *self.features, generator=generator)
            return {"input_features": made.to(self.dtype)}
        shape = (rows, sizes[SOURCE])
        ids = torch.randint(self.vocabulary, shape, generator=generator)
        return {"input_ids": ids, "attention_mask": _right_padded(*shape, generator)}

    def __call__(self, sizes: dict[str, int], generator: torch.Generator) -> dict[str, Any]:
        """Random inputs of the decoder."""
        rows = sizes[BATCH]
        source = sizes[SOURCE] if self.frames is None else self.frames
        shape = (rows, sizes[SEQUENCE])
        made: dict[str, Any] = {
            "decoder_input_ids": torch.randint(self.vocabulary, shape, generator=generator)
        }
        if self.features is None:
            made["encoder_attention_mask"] = _right_padded(rows, source, generator)
        made["past_key_values"] = [
            {
                part: {
                    name: torch.randn(rows, self.heads, length, self.size, generator=generator).to(
                        self.dtype
                    )
                    for name in ("key", "value")
                }
                for part, length in (("decoder", sizes[PAST]), ("encoder", source))
            }
            for _ in range(self.layers)
        ]
        return made

    @property
    def encoder_shapes(self) -> dict[str, Any]:
        """Which axes of the encoder's inputs vary, in torch.export's form."""
        if self.features is not None:
            return {"input_features": {0: BATCH}}
        return {name: {0: BATCH, 1: SOURCE} for name in ("input_ids", "attention_mask")}

    @property
    def decoder_shapes(self) -> dict[str, Any]:
        """Which axes of the decoder's inputs vary, in torch.export's form."""
        source = {0: BATCH, 2: SOURCE} if self.frames is None else {0: BATCH}
        lengths = {"decoder": {0: BATCH, 2: PAST}, "encoder": source}
        shapes: dict[str, Any] = {"decoder_input_ids": {0: BATCH, 1: SEQUENCE}}
        if self.features is None:
            shapes["encoder_attention_mask"] = {0: BATCH, 1: SOURCE}
        shapes["past_key_values"] = [
            {part: {"key": axes, "value": axes} for part, axes in lengths.items()}
            for _ in range(self.layers)
        ]
        return shapes


def _right_padded(rows: int, length: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    return (torch.arange(length) < lengths).long()
