"""Ops that torch.onnx.export writes down as their formula and torch.compile keeps whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._ops import OpOverload

T = TypeVar("T", Tensor, list[Tensor])


def register_traced(op: OpOverload, fake: Callable[..., T], formula: Callable[..., T]) -> None:
    """Register the fake kernel of an op and the plain-torch formula that exporters write down.

    torch.onnx.export consults torch's table of decompositions, so a model with our layers exports
    for whoever calls it, as ordinary operators. torch.compile has a table of its own.

    Args:
        op: A compiled op, ``torch.ops.gauge_ext.<name>.default``.
        fake: Takes what the op takes; returns tensors of the shapes and dtypes that it returns.
        formula: Takes the same, and computes it in torch's operators.
    """

    def traced(*args: object, **kwargs: object) -> T:
        _keep_whole(op)
        return fake(*args, **kwargs)

    torch.library.register_fake(op.name(), traced)
    register_decomposition(op)(formula)


def _keep_whole(op: OpOverload) -> None:
    """Tell torch.compile that an op with a decomposition is meant to stay one.

    Inductor calls an op that it does not know as it is, except where the environment has ``CI``
    set: there it takes a decomposition that it does not use for an oversight and raises
    (torch/_inductor/lowering.py, make_fallback). It asks first whether somebody has lowered the op.
    It traces through the fake kernels before it lowers, and takes a second to import, so that it
    is told from there, once it is loaded.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        lowering.make_fallback(op, lowering.constrain_to_fake_tensors, warn=False)
