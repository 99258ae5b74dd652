"""Which adapter each row of a batch gets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gauge_ext.errors import AdapterStateError, ConfigError


class Rows(NamedTuple):
    """Which adapter each row of the batches to come gets at one module.

    Attributes:
        names: Names of adapters of the module.
        numbers: Which of them each row gets, -1 for none: int64, on the CPU.
        path: What errors call the module.
    """

    names: tuple[str, ...]
    numbers: Tensor
    path: str


class Apart(NamedTuple):
    """The rows of a batch that ask for different parameters of one module.

    Attributes:
        rows: Which adapter each gets.
        groups: For each adapter, and for none (None), its rows in ascending order.
        order: Where each row is among those of all groups, one group after the other.
    """

    rows: Rows
    groups: tuple[tuple[str | None, Tensor], ...]
    order: Tensor


def apart(rows: Rows) -> Apart | None:
    """Return the groups of the rows, or None where all rows ask for the same."""
    places: dict[int, list[int]] = {}
    for row, number in enumerate(rows.numbers.tolist()):
        places.setdefault(number, []).append(row)
    if len(places) < 2:
        return None
    groups = tuple(
        (None if number < 0 else rows.names[number], torch.tensor(found))
        for number, found in places.items()
    )
    return Apart(rows, groups, torch.cat([found for _, found in groups]).argsort())


def only_name(rows: Rows) -> str | None:
    """Return the adapter that all rows get; None: none."""
    number = int(rows.numbers[0]) if len(rows.numbers) else -1
    return None if number < 0 else rows.names[number]


def require_samples(x: Tensor, rows: Rows) -> None:
    """Refuse an input whose first dimension is not the batch that names were given for.

    Raises:
        ConfigError: It has another size.
    """
    if x.dim() == 0 or x.shape[0] != len(rows.numbers):
        raise ConfigError(
            f"there are names of adapters for {len(rows.numbers)} samples, and {rows.path!r} got "
            f"an input of shape {tuple(x.shape)}, whose first dimension is not that.",
            hint="Give a name for each sample. A layer that sees no batch, such as one of "
            "positions, can't tell samples apart: leave it out of the adapters.",
        )


def read_apart(rows: Rows, name: str) -> AdapterStateError:
    """Return the error of a parameter that is read while each row has one of its own."""
    return AdapterStateError(
        f"{name!r} of {rows.path!r} was read by its name, and the samples of this batch have "
        "different ones: only a module that is called can tell them apart.",
        hint="Call the model once for each adapter, with use_adapters().",
    )
