"""The Python face of ``torch.ops.gauge_ext.dora_scale``: outputs scaled one by one, as by DoRA."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference
from gauge_ext.ops.decomposed import register_traced
from gauge_ext.ops.meta import require_values

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # that the kernels store
# The schema that csrc/ops/dora_scale.cpp registers; needed here where nothing is compiled.
_SCHEMA = "dora_scale(Tensor y, Tensor gain, Tensor? bias=None) -> Tensor"


def dora_scale(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Return the outputs of a layer scaled by DoRA's gain, with the bias.

    .. math:: z = g \circ y + b

    which is the layer of the weight :math:`\mathrm{diag}(g)\,(W + s B A)` where y is that of
    :math:`W + s B A` (DoRA, arXiv:2402.09353, equation 5). One pass over y; the backward pass goes
    once over y and the gradient of z, for :math:`\partial y = g \circ \partial z` and
    :math:`\partial g = \sum_n \partial z_n \circ y_n`. Computed in float32 or wider, rounded once.

    Args:
        y: ``(*batch, out)``, floating-point. Of other dtypes than float32, float64 and bfloat16,
            and elsewhere than on the CPU, the plain-torch formula runs.
        gain: g, ``(out,)``, floating-point.
        bias: b, ``(out,)``, floating-point, or None.

    Returns:
        ``(*batch, out)``, of y's dtype.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; the message names the argument, what
            was expected and what came.
    """
    has_kernels = y.is_meta or (y.is_cpu and y.dtype in _DTYPES)
    # torch.jit.trace writes down ordinary operators; see lora_linear.
    if not has_kernels or torch._C._get_tracing_state() is not None:
        return reference.dora_scale(y, gain, bias)
    return cast(Tensor, _op(y, gain, bias))


def _fake_scale(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    require_values(y, gain, bias)
    return y.new_empty(y.shape)


def _fake_backward(
    grad: Tensor, y: Tensor, gain: Tensor, needs_y: bool, needs_gain: bool
) -> tuple[Tensor, Tensor]:
    return (
        y.new_empty(y.shape if needs_y else (0,)),
        gain.new_empty(gain.shape if needs_gain else (0,)),
    )


def _register_compiled() -> None:
    torch.library.register_fake("gauge_ext::dora_scale_backward", _fake_backward)
    register_traced(torch.ops.gauge_ext.dora_scale.default, _fake_scale, reference.dora_scale)


def _register_fallback() -> torch.library.Library:
    """Puts the plain-torch formula under the op's name, where no compiled build is loaded."""
    library = torch.library.Library("gauge_ext", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("dora_scale", reference.dora_scale, "CompositeImplicitAutograd")
    return library


if _load.load().compiled:
    _register_compiled()
else:
    _fallback = _register_fallback()  # a Library unregisters its ops when it is collected

_op = torch.ops.gauge_ext.dora_scale.default
