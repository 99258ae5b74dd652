"""How to choose tokens: the options of transformers' generate that the loop here knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gauge_ext.errors import ConfigError

# Options of transformers' generate that change tokens and that the loop here does not know, with
# the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "penalty_alpha": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "min_p": (None,),
    "top_h": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; the fields and their meaning are those of transformers' generate.

    Attributes:
        do_sample: Draw from the distribution; otherwise take the most probable token.
        temperature: Logits are divided by it, > 0.
        top_k: Only the k most probable tokens may be drawn; 0 is all of them.
        top_p: Only the fewest tokens whose probabilities add up to at least this may be drawn.
        repetition_penalty: Logits of tokens that are there already are divided by it where
            positive and multiplied where negative; 1 is none.
        suppress_tokens: Never taken.
        begin_suppress_tokens: Not taken as the first token.
        eos_token_id: Each of these ends a row.
        pad_token_id: Written after the end of a row.

    Raises:
        ConfigError: a value outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("temperature", self.temperature > 0 and math.isfinite(self.temperature), "above 0"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def pad(self) -> int:
        """What is written after the end of a row: the padding token, or the first end token."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @classmethod
    def read(cls, path: Path) -> Sampling:
        """The settings in a ``generation_config.json``; the defaults where there is none.

        Raises:
            ConfigError: it cannot be read, or asks for what this loop does not do.
        """
        return cls().updated(read_settings(path), where=str(path)) if path.exists() else cls()

    def updated(self, options: Mapping[str, Any], *, where: str = "generate") -> Sampling:
        """A copy with other values.

        Args:
            options: Fields of this class, or options of transformers' generate that have the value
                at which they do nothing; keys that do not concern the choice of tokens are ignored
                in a file and refused in a call.
            where: What to call them in a message.

        Raises:
            ConfigError: an option that this loop does not know.
        """
        known = {field.name for field in fields(self)}
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name in known:
                given[name] = value
            elif name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ConfigError(
                    f"{where}: {name}={value!r} is not implemented by this loop.",
                    hint=f"Take it out, or give {name}={_NEUTRAL[name][-1]!r}.",
                )
            elif name not in _NEUTRAL and where == "generate":
                raise ConfigError(
                    f"generate has no option {name!r}.", hint=f"It has {', '.join(sorted(known))}."
                )
        for name in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id"):
            if name in given:
                given[name] = _token_ids(given[name])
        defaults = Sampling()
        filled = {n: getattr(defaults, n) if v is None else v for n, v in given.items()}
        return replace(self, **filled)


def read_settings(path: Path) -> dict[str, Any]:
    """A file of settings of transformers.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(found).__name__}.")
    return found


def _token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)
