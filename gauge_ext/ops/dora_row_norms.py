"""The Python face of ``torch.ops.gauge_ext.dora_row_norms``: what DoRA divides magnitudes by."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.meta import require_values

# The schema that csrc/ops/dora_row_norms.cpp registers; needed here where nothing is compiled.
_SCHEMA = "dora_row_norms(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor"


def dora_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    r"""Return the norm of each row of ``W + s B A``, without forming it.

    .. math:: n_i = \| W_i + s\,B_i A \|_2

    They are constants: no gradient passes (DoRA, arXiv:2402.09353, section 4.3). On the CPU it is
    one pass over W, in which a few entries of the sum at a time are in registers; so a row that the
    update all but cancels has a norm as exact as any. Elsewhere, for subclasses of tensors and
    under torch.jit.trace the norms come in torch's operators from

    .. math:: \|W_i\|^2 + 2 s \langle (W A^T)_i, B_i \rangle + s^2 B_i (A A^T) B_i^T

    Args:
        weight: W, ``(out, in)``, floating-point; one that lies transposed (``weight.mT``) is read
            as it lies. Of a convolution: ``flatten(1)`` of all three.
        lora_A: A, ``(r, in)``, floating-point.
        lora_B: B, ``(out, r)``, floating-point.
        scaling: s.

    Returns:
        ``(out,)`` in float32, or in float64 where W or a factor is; computed so too.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument, what
            was expected and what came.
    """
    # A subclass (quantised, distributed) knows best itself how it is multiplied.
    plain = type(weight) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()
    has_kernels = plain and (weight.is_cpu or weight.is_meta)
    if not has_kernels or torch._C._get_tracing_state() is not None:
        return reference.dora_row_norms(weight, lora_A, lora_B, scaling)
    return cast(Tensor, _op(weight, lora_A, lora_B, scaling))


def _fake_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    require_values(weight, lora_A, lora_B)
    return weight.new_empty(weight.shape[:1], dtype=reference.norm_dtype(weight, lora_A, lora_B))


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("dora_row_norms", reference.dora_row_norms, "CompositeImplicitAutograd")
    return library


if _load.load().compiled:
    _default = torch.ops.gauge_ext.dora_row_norms.default
    register_traced(_default, _fake_norms, reference.dora_row_norms)
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.dora_row_norms.default
