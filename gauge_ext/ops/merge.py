"""The Python face of ``torch.ops.gauge_ext.merge_``: adapters into weights, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gauge_ext import _load
from gauge_ext.ops import reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MergeSums(NamedTuple):
    """What a merge did to one weight. D is the update, K what the weight changed by after rounding.

    Attributes:
        finite: Whether every entry of the result is finite.
        delta: Frobenius norm of D; NaN where no fidelity was asked for, as for those below.
        kept: Frobenius norm of K.
        lost: Frobenius norm of D - K.
    """

    finite: bool
    delta: float
    kept: float
    lost: float


def merge_(
    weight: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    *,
    transposed: bool | Sequence[bool] = False,
    seed: Tensor | None = None,
    first_row: int = 0,
    fidelity: bool = False,
) -> tuple[MergeSums, ...]:
    r"""Add low-rank updates to weights in place, rounding each entry once.

    .. math:: W \leftarrow \mathrm{round}(W + s\,B A)

    The update is summed from zero in float32 (float64 for a float64 W) whatever the dtypes are, and
    is never formed whole: one pass over W, a few rows and columns at a time, also where the result
    is checked and its fidelity measured. One weight, or many in one call.

    A weight that does not fit into memory is merged by rows: ``merge_(block, lora_A, lora_B[rows],
    s, first_row=rows.start)`` gives the bits of the whole. A numpy array is merged through
    ``torch.from_numpy``, which shares its memory. On a GPU the bits are those of a CPU with AVX2 or
    newer, and the call waits for the GPU once, to return what was done.

    Args:
        weight: W, ``(out, in)``, or ``(in, out)`` where ``transposed``; float32, float64, bfloat16
            or float16, the last dimension contiguous. A convolution's weight: ``flatten(1)`` of
            all three.
        lora_A: ``(r, in)``, floating-point.
        lora_B: ``(out, r)``, floating-point.
        scaling: s.
        transposed: Whether W is transposed, as in transformers' Conv1D (``fan_in_fan_out``).
        seed: ``()`` int64: round to one of the two neighbours by chance, so that the expectation is
            the exact sum (arXiv:1502.02551, section 3); a function of seed, position in the list,
            row and column alone. For bfloat16 and float16. None: to nearest, ties to even.
        first_row: The row of the whole weight that the first one given is; it matters with a
            ``seed`` alone.
        fidelity: Measure how much of the update survives the rounding.

    Returns:
        For each weight what was done. Nothing is raised where a result is not finite: look at
        ``finite``, and use :func:`merge_into` where the weight must survive that.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; nothing is written then.
    """
    weights = _listed(weight)
    return _run(weights, weights, lora_A, lora_B, scaling, transposed, seed, first_row, fidelity)


def merge_into(
    out: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    *,
    transposed: bool | Sequence[bool] = False,
    seed: Tensor | None = None,
    first_row: int = 0,
    fidelity: bool = False,
) -> tuple[MergeSums, ...]:
    """Write ``round(W + s·B A)`` into ``out`` and leave W alone; as :func:`merge_` otherwise.

    Args:
        out: Of weight's shape and dtype: the weight itself, or sharing no memory with it.
        weight: See :func:`merge_`, as for the arguments below.
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scaling: s.
        transposed: Whether W is transposed.
        seed: Of stochastic rounding.
        first_row: See :func:`merge_`.
        fidelity: See :func:`merge_`.

    Returns:
        For each weight what was done.

    Raises:
        RuntimeError: A shape, dtype or device does not fit; nothing is written then.
    """
    weights, outs = _listed(weight), _listed(out)
    return _run(outs, weights, lora_A, lora_B, scaling, transposed, seed, first_row, fidelity)


def merges_in_one_pass(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Say whether the compiled kernel takes these, and sums as wide as the widest of them.

    Elsewhere :func:`merge_` takes several passes, and a float64 factor is rounded to float32 beside
    a weight that is not float64.
    """
    every = weight, lora_A, lora_B
    return (
        _load.status().compiled
        # A subclass (quantised, distributed, fake) knows best itself how it is added to.
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in every)
        and _has_kernels(every)
        and weight.layout == torch.strided
        and weight.dim() == lora_A.dim() == lora_B.dim() == 2
        and 1 in weight.stride()
        and weight.dtype in _DTYPES
        and (weight.dtype == torch.float64 or torch.float64 not in (lora_A.dtype, lora_B.dtype))
    )


def _has_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether the compiled kernel runs where these are: all on the CPU, or all on one GPU."""
    build = _load.status()
    devices = {tensor.device for tensor in tensors}
    if not build.compiled or len(devices) != 1:
        return False
    device = devices.pop()
    return device.type == "cpu" or (device.type == "cuda" and build.cuda)


def _listed(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@torch.no_grad()
def _run(
    outs: list[Tensor],
    weights: list[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    transposed: bool | Sequence[bool],
    seed: Tensor | None,
    first_row: int,
    fidelity: bool,
) -> tuple[MergeSums, ...]:
    a, b = _listed(lora_A), _listed(lora_B)
    scale = [scaling] * len(weights) if isinstance(scaling, int | float) else list(scaling)
    flip = [transposed] * len(weights) if isinstance(transposed, bool) else list(transposed)
    if not weights:
        return ()
    if _has_kernels(weights):
        op = torch.ops.gauge_ext.merge_out.default
        # On a GPU nothing has waited for it yet; to read what became of the weights is to wait.
        sums = op(weights, a, b, scale, flip, seed, first_row, fidelity, out=outs).tolist()
    else:
        sums = _plain(outs, weights, a, b, scale, flip, seed, first_row)
    return tuple(
        MergeSums(bool(finite), *(math.sqrt(s) if fidelity else math.nan for s in squares))
        for finite, *squares in sums
    )


def _plain(
    outs: list[Tensor],
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    transposed: list[bool],
    seed: Tensor | None,
    first_row: int,
) -> list[list[float]]:
    """The same in torch: for other devices, several of them, and where nothing is compiled."""
    if seed is not None and not {w.dtype for w in weights} <= {torch.bfloat16, torch.float16}:
        raise RuntimeError("seed asks for stochastic rounding: for bfloat16 and float16 weights.")
    every = zip(outs, weights, lora_A, lora_B, scaling, transposed, strict=True)
    sums = []
    for layer, (out, weight, a, b, s, flip) in enumerate(every):
        rows, columns = weight.shape
        bits = None
        if seed is not None:
            bits = reference.rounding_bits(rows, columns, seed, layer, first_row)
        merged, delta = reference.merge(weight, a, b, s, transposed=flip, bits=bits)
        kept = merged.to(delta.dtype) - weight.to(delta.dtype)
        parts = (delta, kept, delta - kept)
        squares = [float(part.double().square().sum()) for part in parts]
        out.copy_(merged)
        sums.append([float(merged.isfinite().all()), *squares])
    return sums


def _fake_merge(
    weight: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    transposed: list[bool],
    seed: Tensor | None = None,
    first_row: int = 0,
    fidelity: bool = False,
    out: list[Tensor] | None = None,
) -> Tensor:
    where = weight[0].device if weight else None
    return torch.empty(len(weight), 4, dtype=torch.float64, device=where)


if _load.load().compiled:
    for _name in ("merge_", "merge_out"):
        torch.library.register_fake(f"gauge_ext::{_name}", _fake_merge)
