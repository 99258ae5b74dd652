"""Where a generation begins: rows of tokens and their mask, and the decoder's first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gauge_ext.errors import ConfigError
from gauge_ext.export.language.choose import Ids
from gauge_ext.export.language.sampling import read_settings


def start_token(folder: Path) -> int:
    """The decoder's first token, as a folder's configs name it.

    Raises:
        ConfigError: none does.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = read_settings(path).get("decoder_start_token_id")
            if isinstance(found, int):
                return found
    raise ConfigError(
        f"{folder} names no decoder_start_token_id.", hint="Write it into generation_config.json."
    )


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ConfigError: it has none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(
            f"{folder} has no tokenizer, so the text cannot be turned into tokens.",
            hint="Take a folder that has one.",
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def padded_rows(inputs: Any, attention_mask: Any, pad: int) -> tuple[Ids, Ids]:
    """Token ids and mask as arrays; rows of different length are padded on the left.

    Raises:
        ConfigError: they are no rows of integers, or the mask has another shape.
    """
    try:
        rows = [np.asarray(row, dtype=np.int64) for row in inputs]
        longest = max(row.size for row in rows)
        fine = longest > 0 and all(row.ndim == 1 for row in rows)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ConfigError(
            "token ids must be rows of integers, (batch, length), with at least one token.",
            hint="A single text is a batch of one: [ids].",
        )
    tokens = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - row.size :] = row
        mask[index, longest - row.size :] = 1
    if attention_mask is not None:
        given = np.asarray(attention_mask, dtype=np.int64)
        if given.shape != tokens.shape:
            raise ConfigError(
                f"attention_mask has shape {given.shape}, the token ids {tokens.shape}."
            )
        mask = given
    return tokens, mask
