"""The Python face of ``torch.ops.gauge_ext.lora_gather``: a different adapter for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.meta import require_values

# The schema that csrc/ops/lora_gather.cpp registers; needed here where nothing is compiled.
_SCHEMA = (
    "lora_gather(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, "
    "float[] scaling, Tensor index) -> Tensor"
)


def lora_gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Tensor,
) -> Tensor:
    r"""Apply a linear layer with a different low-rank adapter for each row of a batch.

    .. math:: y_n = x_n W^T + b + s_i\, x_n A_i^T B_i^T, \qquad i = \mathrm{index}_n

    The base is multiplied once for all rows; the rows are sorted by adapter inside, and no factor
    is copied (Punica, arXiv:2310.18547, section 4; S-LoRA, arXiv:2311.03285, section 5). Adapters
    may differ in rank. Gradients flow to x and to every adapter; nothing but x is saved for the
    backward pass.

    Args:
        x: ``(*batch, in)``; float32, float64 or bfloat16, and float16 on CUDA. On other devices the
            plain-torch formula runs, over all adapters side by side.
        weight: ``(out, in)``, of x's dtype.
        bias: ``(out)``, of x's dtype, or None.
        lora_A: One ``(r_i, in)`` for each adapter, of x's dtype or float32.
        lora_B: One ``(out, r_i)`` for each adapter, of lora_A's dtype.
        scaling: One s for each adapter.
        index: int64, of the shape of the first batch dimensions of x: ``(batch)`` for x
            ``(batch, tokens, in)`` gives all tokens of a sample one adapter. -1: none. On the CPU
            or on x's device, where a CUDA graph reads it anew at each replay.

    Returns:
        ``(*batch, out)``, of x's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit, or an index is out of range; the
            message names the argument, what was expected and what came. An index on a GPU is
            checked there, by an assertion of CUDA's, as those of torch's own indexing.
    """
    # torch.jit.trace writes down ordinary operators; see lora_linear.
    has_kernels = x.is_cpu or x.is_meta or (x.is_cuda and _load.load().cuda)
    if not has_kernels or torch._C._get_tracing_state() is not None:
        return reference.lora_gather(x, weight, bias, lora_A, lora_B, scaling, index)
    return cast(Tensor, _op(x, weight, bias, list(lora_A), list(lora_B), list(scaling), index))


def _fake_gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    index: Tensor,
) -> Tensor:
    require_values(x, weight, bias, *lora_A, *lora_B)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    index: Tensor,
    needs_x: bool,
    needs_factors: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def wanted(needed: bool, like: Tensor) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    grads_A = [wanted(needs_factors, factor) for factor in lora_A]
    grads_B = [wanted(needs_factors, factor) for factor in lora_B]
    return wanted(needs_x, x), grads_A, grads_B


def _register_compiled() -> None:
    torch.library.register_fake("gauge_ext::lora_gather_backward", _fake_backward)
    register_traced(torch.ops.gauge_ext.lora_gather.default, _fake_gather, reference.lora_gather)


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("lora_gather", reference.lora_gather, "CompositeImplicitAutograd")
    return library


if _load.load().compiled:
    _register_compiled()
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.lora_gather.default
