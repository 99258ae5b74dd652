"""The Python face of ``torch.ops.gauge_ext.lora_embedding``: a table with a low-rank adapter."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.meta import require_values

# The schema that csrc/ops/lora_embedding.cpp registers; needed here where nothing is compiled.
_SCHEMA = (
    "lora_embedding(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "int? padding_idx=None) -> Tensor"
)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
) -> Tensor:
    r"""Return the rows of a table and of its low-rank adapter.

    .. math:: y_n = W_{t_n} + s\, B A_{:, t_n}, \qquad t = \mathrm{ids}

    Equivalent to::

        hidden = F.embedding(ids, A.T, padding_idx)
        y = F.embedding(ids, weight) + (scaling * hidden @ B.T).to(weight.dtype)

    in one pass over y, rounded once. The update is accumulated in float32 or wider, the gradients
    too; nothing but ids and the factors is saved for the backward pass. The gradient of lora_A is
    dense, and summed in the order of ids. The table is taken to be frozen: where it requires a
    gradient, the operators above run instead.

    Args:
        ids: ``(*)``, int64 or int32, in [0, vocab).
        weight: ``(vocab, dim)``, float32, float64 or bfloat16. Elsewhere than on the CPU the
            plain-torch formula runs.
        lora_A: ``(r, vocab)``, of weight's dtype or float32.
        lora_B: ``(dim, r)``, of lora_A's dtype.
        scaling: s.
        padding_idx: The token whose column of lora_A gets no gradient, in [0, vocab), or None.

    Returns:
        ``(*, dim)``, of weight's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument, what
            was expected and what came.
        IndexError: An id is not in the table.
    """
    # torch.jit.trace writes down ordinary operators; see lora_linear.
    has_kernels = weight.is_cpu or weight.is_meta
    if not has_kernels or torch._C._get_tracing_state() is not None:
        return reference.lora_embedding(ids, weight, lora_A, lora_B, scaling, padding_idx)
    return cast(Tensor, _op(ids, weight, lora_A, lora_B, scaling, padding_idx))


def _fake_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
) -> Tensor:
    require_values(ids, weight, lora_A, lora_B)
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _fake_backward(
    grad: Tensor,
    ids: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor, Tensor]:
    def wanted(needed: bool, like: Tensor) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    return wanted(needs_A, lora_A), wanted(needs_B, lora_B)


def _register_compiled() -> None:
    torch.library.register_fake("gauge_ext::lora_embedding_backward", _fake_backward)
    op = torch.ops.gauge_ext.lora_embedding.default
    register_traced(op, _fake_embedding, reference.lora_embedding)


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("lora_embedding", reference.lora_embedding, "CompositeImplicitAutograd")
    return library


if _load.load().compiled:
    _register_compiled()
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.lora_embedding.default
