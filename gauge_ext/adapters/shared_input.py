"""Layers that read the same tensor, computed together by the first of them that is called."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gauge_ext import ops
from gauge_ext.adapters import recompute

if TYPE_CHECKING:
    from gauge_ext.adapters.lora import LoRALinear

_PARAMETERS = ("weight", "bias", "lora_A", "lora_B")


@dataclass
class _Results:
    """What was computed for members that were not called yet, and under which circumstances."""

    x: weakref.ref[Tensor]
    x_version: int
    state: tuple[Any, ...]
    ys: dict[int, Tensor]


class SharedInput:
    """Plain :class:`~gauge_ext.LoRALinear` layers that are called with one and the same tensor.

    The first that is called with an x computes the outputs of all, in one op with one gradient of
    x; the others take theirs, if x is the same object and neither it nor a parameter has changed.
    Results are kept until they are taken or another x comes.

    Args:
        members: The layers, in the order of their calls, so that each draws the dropout seed that
            it would draw by itself. They are held weakly: it is the layers that hold the group.
        names: Their names, for messages.
    """

    def __init__(self, members: Sequence[LoRALinear], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._members = [weakref.ref(member) for member in members]
        self._results: _Results | None = None
        self._warned = False

    def forward(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """Return the output of ``layer``, or None where it must compute it by itself.

        That is where a member is gone, merged, of another class, in another mode or has hooks that
        come before its forward, and while torch.jit traces.
        """
        results, self._results = self._results, None  # taken out, so that threads cannot share it
        members = [m for member in self._members if (m := member()) is not None]
        index = next((i for i, member in enumerate(members) if member is layer), None)
        if index is None or x.is_inference() or not self._can_group(members):
            return None
        state = _state(members)
        if results is not None:
            unchanged = results.x() is x and results.x_version == x._version
            if unchanged and results.state == state and index in results.ys:
                y = results.ys.pop(index)
                self._results = results if results.ys else None
                return y
            self._warn(results)
        if members[0].recomputes_input:
            ys = dict(enumerate(recompute.call(partial(_compute, members), x)))
        else:
            ys = dict(enumerate(_compute(members, x)))
        y = ys.pop(index)
        self._results = _Results(weakref.ref(x), x._version, state, ys)
        return y

    def _can_group(self, members: Sequence[LoRALinear]) -> bool:
        first = members[0]
        return (
            len(members) == len(self._members)
            and torch._C._get_tracing_state() is None
            and all(
                type(member) is type(first)
                and member.is_plain
                and member.has_branch
                and member.training == first.training
                and member.dropout_p == first.dropout_p
                and not member._forward_pre_hooks
                and all(name in member._parameters for name in _PARAMETERS)
                for member in members
            )
        )

    def _warn(self, results: _Results) -> None:
        if not self._warned:
            self._warned = True
            unused = ", ".join(self.names[index] for index in results.ys)
            warnings.warn(
                f"the outputs of {unused} were computed along with those of "
                f"{self.names[0]}'s group and not used. Where that goes on, call "
                "gauge_ext.models.ungroup(model).",
                stacklevel=4,
            )


def _compute(members: Sequence[LoRALinear], x: Tensor) -> list[Tensor]:
    first = members[0]
    dropout_p = first.dropout_p if first.training else 0.0
    tables: list[dict[str, Any]] = [member._parameters for member in members]
    weights, biases, lora_As, lora_Bs = ([p[name] for p in tables] for name in _PARAMETERS)
    return ops.lora_linear_group(
        x,
        weights,
        biases,
        lora_As,
        lora_Bs,
        [member.scaling for member in members],
        dropout_p,
        [ops.draw_seed() for _ in members] if dropout_p > 0.0 else (),
    )


def _state(members: Sequence[LoRALinear]) -> tuple[Any, ...]:
    """Return all that the outputs depend on beside x, as something to compare."""
    parameters = [member._parameters[name] for member in members for name in _PARAMETERS]
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        # Under activation checkpointing: what is kept belongs to one region, and not to another.
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        members[0].training,
        *(member.scaling for member in members),
        *((id(p), 0 if p is None or p.is_inference() else p._version) for p in parameters),
    )
