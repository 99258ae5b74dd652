"""Example inputs made up from a transformers model's config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from gauge_ext.cli.problems import OptionError
from gauge_ext.errors import ConfigError

_BATCH = 2
_SEQUENCE = 16

Inputs = dict[str, torch.Tensor]
Shapes = dict[str, dict[int, Any]]


def make_example_inputs(
    model: nn.Module, *, batch: int | None, sequence: int | None, seed: int
) -> tuple[Inputs, Shapes]:
    """Make inputs that the model accepts, and say which of their sizes may change.

    Text models get ``input_ids``, ``attention_mask`` with a padded row, ``token_type_ids`` where
    the model has them, and ``decoder_input_ids`` where it has a decoder of its own; image models
    get ``pixel_values``.

    Args:
        model: A transformers model, or any module with such a ``config`` and ``main_input_name``.
        batch: Batch size; 2 if None (torch.export takes a size of 1 for a constant).
        sequence: Length in tokens; 16, or the longest that the model takes, if None.
        seed: Of the random ids and pixels.

    Returns:
        The inputs by name, and their dynamic sizes in torch.export's form.

    Raises:
        ConfigError: The model is not of a kind that inputs can be made for, or a size is one that
            it cannot take.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if config is not None and kind == "input_ids":
        return _text(model, config, batch or _BATCH, sequence, generator)
    if config is not None and kind == "pixel_values" and hasattr(config, "image_size"):
        if sequence is not None:
            raise OptionError(
                "--sequence", "the model takes images, not tokens.", hint="Leave it out."
            )
        return _image(config, batch or _BATCH, generator)
    raise ConfigError(
        f"no example inputs are known for {type(model).__name__}.",
        hint="Give module:factory, with a factory that returns (model, example_inputs).",
    )


def _text(
    model: nn.Module, config: Any, batch: int, sequence: int | None, generator: torch.Generator
) -> tuple[Inputs, Shapes]:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    # Models that number positions from pad_token_id + 1 on (RoBERTa and kin) lose that many.
    padding_idx = getattr(_position_embedding(model), "padding_idx", None)
    if longest is not None and padding_idx is not None:
        longest -= padding_idx + 1
    if sequence is None:
        sequence = _SEQUENCE if longest is None else min(_SEQUENCE, longest)
    elif longest is not None and sequence > longest:
        raise OptionError(
            "--sequence",
            f"the model takes at most {longest} tokens, got {sequence}.",
            hint="Give a smaller number.",
        )

    accepted = inspect.signature(model.forward).parameters
    ids = torch.randint(0, text.vocab_size, (batch, sequence), generator=generator)
    inputs = {"input_ids": ids}
    if "attention_mask" in accepted:
        mask = torch.ones_like(ids)
        mask[-1, (sequence + 1) // 2 :] = 0  # a shorter last row, so that the mask is put to use
        inputs["attention_mask"] = mask
    segments = getattr(text, "type_vocab_size", 0)
    if "token_type_ids" in accepted and segments > 0:
        inputs["token_type_ids"] = torch.randint(0, segments, ids.shape, generator=generator)

    rows, tokens = Dim("batch"), Dim("sequence", max=longest)
    shapes: Shapes = {name: {0: rows, 1: tokens} for name in inputs}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(
            0, text.vocab_size, (batch, max(2, sequence // 2)), generator=generator
        )
        shapes["decoder_input_ids"] = {0: rows, 1: Dim("decoder_sequence", max=longest)}
    return inputs, shapes


def _position_embedding(model: nn.Module) -> nn.Module | None:
    """Find the table of learned positions, if the model has one."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module
    return None


def _image(config: Any, batch: int, generator: torch.Generator) -> tuple[Inputs, Shapes]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}, {
        "pixel_values": {0: Dim("batch")}
    }
