"""``model(x, adapter_names=[...])``: each sample's adapter, said where the model is called."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

ARGUMENT = "adapter_names"
# What PEFT calls the base alone in such a list.
BASE = "__base__"

_HANDLES = "_gauge_ext_row_names"
_OPEN = "_gauge_ext_open_rows"


def accept_row_names(model: nn.Module) -> None:
    """Let ``model`` take the argument ``adapter_names`` in every call, beside those of its own.

    It is taken out before the model's own forward sees it, and holds for that call: see
    :func:`gauge_ext.models.adapter_rows`.
    """
    if _HANDLES not in vars(model):
        before = model.register_forward_pre_hook(_begin, with_kwargs=True, prepend=True)
        after = model.register_forward_hook(_end, always_call=True)
        vars(model)[_HANDLES] = before, after


def refuse_row_names(model: nn.Module) -> None:
    """Undo :func:`accept_row_names`."""
    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()


def _begin(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if ARGUMENT not in kwargs:
        return None
    from gauge_ext.models.working import adapter_rows

    names = kwargs[ARGUMENT]
    if names is not None:
        rows = adapter_rows(model, [None if name == BASE else name for name in names])
        rows.__enter__()
        vars(model)[_OPEN] = rows
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}


def _end(model: nn.Module, args: object, output: object) -> None:
    rows: AbstractContextManager[None] | None = vars(model).pop(_OPEN, None)
    if rows is not None:
        rows.__exit__(None, None, None)
