"""A module called once for the rows of each adapter, where these want different parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.adapters.many import NamedAdapters
from gauge_ext.adapters.rows import Apart, require_samples
from gauge_ext.errors import AdapterStateError


def by_groups(
    holder: NamedAdapters,
    module: nn.Module,
    split: Apart,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Call a module once for each adapter, with the rows that have it.

    Args:
        holder: What holds the adapters of the module: itself, or one inside it.
        module: The module. All others inside it see the same part of the batch.
        split: The rows.
        call: What calls it: ``call(name, *args, **kwargs)`` with its parameters of that adapter.
        args: Its arguments, one of which, or of ``kwargs``, is a tensor ``(rows, *)``.
        kwargs: The others.

    Returns:
        What the calls return, ``(rows, *)``, in the order of the rows.

    Raises:
        AdapterStateError: It has several tensors as arguments, or none, or returns none whose
            first dimension is the batch.
        ConfigError: See :func:`~gauge_ext.adapters.rows.require_samples`.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    kind = type(module).__name__
    if len(tensors) != 1:
        raise _undefined(split, f"this {kind} has {len(tensors)} tensors as arguments, not one")
    (x,) = tensors
    require_samples(x, split.rows)
    parts = []
    for name, rows in split.groups:
        part = x.index_select(0, rows.to(x.device))
        given = [part if value is x else value for value in args]
        named = {key: part if value is x else value for key, value in kwargs.items()}
        with _of_rows(holder, module, rows):
            y = call(name, *given, **named)
        if not isinstance(y, Tensor):
            raise _undefined(split, f"this {kind} returns a {type(y).__name__}, not one tensor")
        if y.dim() == 0 or y.shape[0] != len(rows):
            raise _undefined(split, f"of {len(rows)} samples this {kind} makes {tuple(y.shape)}")
        parts.append(y)
    return torch.cat(parts).index_select(0, split.order.to(parts[0].device))


def _undefined(split: Apart, reason: str) -> AdapterStateError:
    return AdapterStateError(
        f"the samples of a batch cannot have parameters of their own at {split.rows.path!r}: "
        f"{reason}, so which part belongs to which sample is not known.",
        hint="Call the model once for each adapter, with use_adapters().",
    )


@contextmanager
def _of_rows(holder: NamedAdapters, module: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let the layers inside ``module`` know that they see these rows of the batch alone."""
    inside = [m for m in module.modules() if m is not holder and isinstance(m, NamedAdapters)]
    before = [layer.rows for layer in inside]
    for layer, there in zip(inside, before, strict=True):
        if there is not None:
            layer.set_rows(there._replace(numbers=there.numbers[rows]))
    try:
        yield
    finally:
        for layer, there in zip(inside, before, strict=True):
            layer.set_rows(there)
