"""The rules by which an adapter's config names modules, as PEFT 0.21 defines them.

A *selector* (``target_modules``, ``exclude_modules``) is either one regular expression that must
match a module's whole path, or several names, each of which is a module's whole path or the end of
it after a dot. A *pattern table* (``rank_pattern``, ``alpha_pattern``) maps regular expressions to
values; the first expression that matches the end of the path wins.

Source: ``check_target_module_exists`` and ``get_pattern_key`` in peft/tuners/tuners_utils.py and
peft/utils/other.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def selects(selector: str | Iterable[str], name: str) -> bool:
    """Say whether ``selector`` names the module at path ``name``.

    Args:
        selector: A regular expression, or names.
        name: The module's path, such as ``encoder.layer.0.attention.self.query``.
    """
    if isinstance(selector, str):
        return re.fullmatch(selector, name) is not None
    return any(name_selects(entry, name) for entry in selector)


def name_selects(entry: str, name: str) -> bool:
    """Say whether one name of a list selects the module: its path, or the end of it."""
    return name == entry or name.endswith(f".{entry}")


def lookup(table: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first expression in ``table`` that matches the end of ``name``.

    A key that is the very path counts too, even where it does not match itself as an expression.
    """
    for expression, value in table.items():
        if re.match(rf"(.*\.)?({expression})$", name):
            return value
    return table.get(name, default)


def layer_index(name: str, patterns: Iterable[str]) -> int | None:
    """Return the index of the layer that the module at path ``name`` belongs to, or None.

    Args:
        name: The module's path.
        patterns: Names of the list that holds the layers (``layers``, ``h``); with none, the first
            numbered part of the path, two parts or more from its start, is the index.
    """
    found = None
    if patterns := list(patterns):
        for pattern in patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name):
                break
    else:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    return int(found["index"]) if found else None
