"""What the fields of a LoRAConfig may hold; each check returns the value in the form it is kept in.

Each raises :class:`~gauge_ext.errors.ConfigError`, which names the field and says what it must be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gauge_ext.errors import ConfigError


def wrong(name: str, expected: str, got: object) -> ConfigError:
    """The error that says of a field what it must be and what it is."""
    return ConfigError(f"{name} must be {expected}, got {got!r}.")


def rank(name: str, value: object) -> int:
    """A rank: a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(name, "a whole number of at least 1", value)
    return value


def finite(name: str, value: object) -> float:
    """A finite number, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(name, "a finite number", value)
    return float(value)


def expression(name: str, value: object) -> str:
    """A regular expression that compiles, and is not empty."""
    if not isinstance(value, str) or not value:
        raise wrong(name, "a string that is not empty", value)
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{name} holds {value!r}, not a regular expression: {error}.") from error
    return value


def selector(name: str, value: object) -> str | tuple[str, ...] | None:
    """An expression or a tuple of names without repetition; None where nothing is named."""
    if value is None:
        return None
    if isinstance(value, str):
        return expression(name, value)
    if not isinstance(value, Iterable):
        raise wrong(name, "a string or a list of strings", value)
    # A set has no order of its own; sorted, the same config is written the same way each time.
    entries = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise wrong(f"each name in {name}", "a string that is not empty", entry)
    return tuple(dict.fromkeys(entries)) or None


def tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Token ids, for one table or by the names of tables; None where there are none."""
    name, expected = "trainable_token_indices", "a list of different token ids from 0 up"
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key for key in value):
            raise wrong(f"each key of {name}", "the name of an embedding", list(value))
        found = {key: tokens(entry) for key, entry in value.items()}
        return {key: ids for key, ids in found.items() if isinstance(ids, tuple)} or None
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise wrong(name, f"{expected}, or such lists by name", value)
    ids = tuple(value)
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
    if not whole or len(set(ids)) < len(ids):
        raise wrong(name, expected, value)
    return ids or None


def table(name: str, value: object, check: Any) -> dict[str, Any]:
    """A table from expressions to numbers, each of which ``check`` lets through."""
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping from expressions to numbers", value)
    return {
        expression(f"each key of {name}", key): check(f"{name}[{key!r}]", number)
        for key, number in value.items()
    }
