"""Where adapters on bare parameters lie in a file: by how PEFT nests its wrappers.

PEFT wraps the module that holds the parameter, and for a further parameter that wrapper again. The
last parameter in the module's own order is the outermost and goes by the module's path; each one
before it lies one ``.base_layer`` deeper. Which parameter it is the file doesn't say: that takes
the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gauge_ext.checkpoint.format import WRAPPED

if TYPE_CHECKING:
    from gauge_ext.adapters import Adapter
    from gauge_ext.adapters.tied import TiedLinear


def file_names(layers: Mapping[str, Adapter | TiedLinear]) -> dict[str, str]:
    """Return path of each adapter in its model -> path that it has in a file."""
    held: dict[str, list[str]] = {}
    for path, layer in layers.items():
        if layer.kind == "parameter":
            held.setdefault(path.rpartition(".")[0], []).append(path)
    names = {path: path for path in layers}
    for holder, paths in held.items():
        names |= nested(holder, paths)
    return names


def nested(holder: str, paths: Sequence[str]) -> dict[str, str]:
    """Return the paths of one module's parameters, in its order, with those in a file."""
    return {path: holder + WRAPPED * depth for depth, path in enumerate(reversed(paths))}
