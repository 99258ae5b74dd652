"""Computing a layer's input again for the backward pass, instead of keeping it.

A frozen linear layer keeps nothing for backward; an adapted one keeps its input x, for the gradient
of A. In a transformer most of these x are the output of a norm or of an activation, whose own
inputs autograd keeps anyway, since gradients pass through them. From these x is made again by one
or two passes over it, with no product of matrices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

# A node of autograd's graph: the C++ class of each operator has its own attributes in Python.
Node = Any
Compute = Callable[[], Tensor]
Y = TypeVar("Y")

_KEY = "gauge_ext.recipe"
_autograd: Any = torch._C._autograd  # its stub lacks a function that is asked below


class Recipe:
    """How a tensor is computed from what its node of the graph keeps.

    Several layers that read one tensor share its recipe, and what it gives: that is held from the
    first of them that asks to the last.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._takers = 0
        self._given = 0
        self._value: Tensor | None = None

    def take(self) -> Recipe:
        """Count one more that will ask for the value."""
        self._takers += 1
        return self

    def value(self) -> Tensor:
        """Return the tensor, computed if nobody holds it, without a graph of its own."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._value = self._compute()
        self._given += 1
        if self._given % self._takers == 0:
            self._value = None
        return value


def call(forward: Callable[[Tensor], Y], x: Tensor) -> Y:
    """Return ``forward(x)``, for whose backward x is computed again where it can be.

    It can where x came of a norm, an activation or a product of elements, see the table below, or
    is a view or a cast of such. It is kept as usual where it came of something else, and where
    others decide what is kept: in ``torch.func``, in compiled and traced code, under activation
    checkpointing, ``save_on_cpu`` or other ``saved_tensors_hooks``, many of which give what they
    took only once, and x is made from what they took.

    Args:
        forward: What an adapted layer computes.
        x: Its input.
    """
    if not _decides(x):
        return forward(x)
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        return forward(x)


def _pack(tensor: Tensor) -> Tensor | Recipe:
    # x itself, its cast under autocast, or what dropout made of it; factors came of no node.
    recipe = None if tensor.grad_fn is None else _recipe_of(tensor.grad_fn)
    return tensor if recipe is None else recipe.take()


def _unpack(kept: Tensor | Recipe) -> Tensor:
    return kept.value() if isinstance(kept, Recipe) else kept


def _decides(x: Tensor) -> bool:
    """Say whether what is kept of x is for this module to say."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.grad_fn is not None
        and torch._C._get_tracing_state() is None
        and _autograd._saved_tensors_hooks_is_enabled()
        and _autograd._top_saved_tensors_default_hooks(False) is None
    )


def _recipe_of(node: Node) -> Recipe | None:
    """Return the recipe of what ``node`` gave, the same as long as somebody holds it."""
    # Weakly: the recipe holds the node, and neither would ever go.
    known = node.metadata.get(_KEY)
    recipe = None if known is None else known()
    if recipe is None:
        compute = _compute_of(node)
        if compute is None:
            return None
        recipe = Recipe(compute)
        node.metadata[_KEY] = weakref.ref(recipe)
    return recipe


def _compute_of(node: Node) -> Compute | None:
    make = _TABLE.get(node.name())
    return None if make is None else make(node)


def _operand(node: Node, name: str, place: int) -> Compute | None:
    """Return what gives an operand of ``node``: it kept that, or it can be computed itself."""
    if getattr(node, name) is not None:
        return lambda: getattr(node, name)
    source = node.next_functions[place][0]
    return None if source is None else _compute_of(source)


def _product(node: Node) -> Compute | None:
    left, right = _operand(node, "_saved_self", 0), _operand(node, "_saved_other", 1)
    if left is None or right is None:
        return None
    return lambda: left() * right()


def _layer_norm(node: Node) -> Compute | None:
    # From mean and reciprocal deviation, since eps is not there. On the CPU they are rounded to
    # half precision where the norm's weight is in it: too coarse to compute x from.
    if node._saved_result2.dtype.itemsize < torch.float32.itemsize:
        return None

    def compute() -> Tensor:
        x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
        y = (x - mean) * rstd
        if node._saved_weight is not None:
            y = y.mul_(node._saved_weight)
        if node._saved_bias is not None:
            y = y.add_(node._saved_bias)
        recomputed: Tensor = y.to(x.dtype)
        return recomputed

    return compute


def _result(node: Node) -> Compute:
    return lambda: node._saved_result


def _cast(node: Node) -> Compute | None:
    source = _compute_of(node.next_functions[0][0])
    if source is None:
        return None
    given = node._input_metadata[0]
    return lambda: source().to(given.device, given.dtype)


def _view(node: Node) -> Compute | None:
    source = _compute_of(node.next_functions[0][0])
    if source is None:
        return None
    shape = node._input_metadata[0].shape
    return lambda: source().reshape(shape)


# By the names that autograd gives the nodes. Nothing here takes more than a pass over its inputs,
# and draws no random numbers.
_TABLE: dict[str, Callable[[Node], Compute | None]] = {
    "GeluBackward0": lambda node: (
        lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    ),
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    "ReluBackward0": _result,
    "SigmoidBackward0": _result,
    "SiluBackward0": lambda node: lambda: F.silu(node._saved_self),
    "TanhBackward0": _result,
    "ToCopyBackward0": _cast,
    "UnsafeViewBackward0": _view,
    "ViewBackward0": _view,
}
