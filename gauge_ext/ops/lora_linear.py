"""The Python face of ``torch.ops.gauge_ext.lora_linear``."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.meta import require_values

# The schema that csrc/ops/lora_linear.cpp registers; needed here where nothing is compiled.
_SCHEMA = (
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "float scaling, float dropout_p=0.0, Tensor? seed=None) -> Tensor"
)

_SEED_MAX = 2**63 - 1


def draw_seed() -> Tensor:
    """Return a fresh dropout seed, ``()`` int64, from torch's default generator.

    ``torch.manual_seed`` makes it repeatable, and activation checkpointing, which restores the
    generator's state, draws the same seed again when it recomputes a layer.
    """
    return torch.randint(_SEED_MAX, (), dtype=torch.int64)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Apply a linear layer and its low-rank adapter (LoRA, arXiv:2106.09685, equation 3).

    .. math:: y = x W^T + b + s\,(x \circ M / (1 - p))\, A^T B^T

    Equivalent to::

        dropped = F.dropout(x, p)
        y = F.linear(x, weight, bias) + scaling * (dropped.to(A.dtype) @ A.T @ B.T).to(x.dtype)

    with a mask M that is drawn again in the backward pass instead of being kept (Philox4x32-10 on
    the element's row and column, see :func:`gauge_ext.ops.reference.dropout_mask`). Only ``x`` and
    the ``(N, r)`` product of x with A are saved for the backward pass.

    Args:
        x: ``(*batch, in)``; float32, float64 or bfloat16, on a CUDA device float16 too. On other
            devices, or in a build without CUDA, the plain-torch formula runs, with the same mask.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out)``, of x's dtype, or None.
        lora_A: ``(r, in)``, of x's dtype or float32.
        lora_B: ``(out, r)``, of lora_A's dtype.
        scaling: s, the factor of the update: alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout_p: p, the probability that an entry of x is dropped on the adapter's branch; rounded
            to a multiple of 2**-16.
        seed: ``()`` int64; required where ``dropout_p`` > 0. See :func:`draw_seed`. On the CPU, or
            on x's device: from there it is read when the kernel runs, so that a CUDA graph draws a
            new mask whenever the seed's memory is written, where one from the CPU stays as it was.

    Returns:
        ``(*batch, out)``, of x's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument, what
            was expected and what came.
    """
    # torch.compile traces Python and cannot look into a compiled function.
    if _call is not None and not is_dynamo_compiling():
        y = _call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        if y is not NotImplemented:
            return cast(Tensor, y)
    # A device without kernels gets the formula in its own operators. So does torch.jit.trace, and
    # with it the legacy ONNX exporter, which writes them down.
    has_kernels = x.is_cpu or x.is_meta or (x.is_cuda and _CUDA)
    if not has_kernels or torch._C._get_tracing_state() is not None:
        return reference.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    return cast(Tensor, _op(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed))


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    require_values(x, weight, bias, lora_A, lora_B)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    hidden = x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0]), dtype=_acc_dtype(x))
    return y, hidden


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def wanted(needed: bool, like: Tensor) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    return wanted(needs_x, x), wanted(needs_A, lora_A), wanted(needs_B, lora_B)


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    require_values(x, weight, bias, lora_A, lora_B)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_mask(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the kernels accumulate in, and hold the (N, r) product in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _register_compiled() -> None:
    """Tells torch.compile and torch.export what the compiled ops return."""
    for name, fake in (
        ("lora_linear_forward", _fake_forward),
        ("lora_linear_backward", _fake_backward),
        ("dropout_mask", _fake_mask),
    ):
        torch.library.register_fake(f"gauge_ext::{name}", fake)
    register_traced(torch.ops.gauge_ext.lora_linear.default, _fake_linear, reference.lora_linear)


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("lora_linear", reference.lora_linear, "CompositeImplicitAutograd")
    return library


_CUDA = _load.load().cuda
_calls = _load.load().calls
# The op by a shorter way than torch.ops; NotImplemented from what it leaves to that
_call = None if _calls is None else _calls.lora_linear
if _load.load().compiled:
    _register_compiled()
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.lora_linear.default
