"""Every op in plain torch: the oracle of the kernels, and their stand-in where no build exists.

The formulas are written for reading. They draw the very same dropout masks as the compiled kernels
(``csrc/math/philox.h``), so that both can be compared element by element with dropout on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section
# 4.3): the multipliers and the Weyl constants that bump the key between rounds.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF

# A block of 128 neighbouring columns is served by 16 counters; each yields four 32-bit words, that
# is eight 16-bit draws. Column e of the block reads counter e % 16 and draw e // 16, so that 16
# neighbours sit in the 16 lanes of one vector register.
_LANES = 16
_DRAWS = 8
_BLOCK = _LANES * _DRAWS


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return Philox4x32-10 of each counter: four independent 32-bit words.

    Args:
        counter: ``(..., 4)`` int64, each entry in [0, 2**32).
        key: ``()`` int64; its low and high 32 bits are the two key words.

    Returns:
        ``(..., 4)`` int64, each entry in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps the bits of the unsigned product.
        low = c0 * _MULTIPLIERS[0]
        high = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK32) ^ c1 ^ k0,
            high & _MASK32,
            ((low >> 32) & _MASK32) ^ c3 ^ k1,
            low & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), -1)


def dropout_threshold(dropout_p: float) -> int:
    """Return the number of 16-bit draws, out of 65,536, that drop an element.

    ``dropout_p`` is so rounded to the nearest multiple of 2**-16; the scale of the kept elements is
    computed from the rounded value, which keeps the expectation exact.
    """
    return round(dropout_p * 65536)


def dropout_mask(rows: int, columns: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the multiplier of each element under inverted dropout, ``M / (1 - p)``.

    The element in row n and column k depends on (seed, n, k) alone: not on the number of threads,
    the instruction set or the device, and it can be drawn again in the backward pass.

    Args:
        rows: Number of rows n.
        columns: Number of columns k.
        dropout_p: Probability of zero, in [0, 1]; rounded to a multiple of 2**-16.
        seed: ``()`` int64.

    Returns:
        ``(rows, columns)`` float64: 0 where dropped, ``65536 / (65536 - threshold)`` elsewhere.
    """
    threshold = dropout_threshold(dropout_p)
    device = seed.device
    blocks = -(-columns // _BLOCK)
    lanes = torch.arange(blocks * _LANES, device=device)
    row = torch.arange(rows, device=device)
    counter = torch.stack(
        (
            lanes.expand(rows, -1),
            (row & _MASK32)[:, None].expand(-1, blocks * _LANES),
            (row >> 32)[:, None].expand(-1, blocks * _LANES),
            torch.zeros((), dtype=torch.int64, device=device).expand(rows, blocks * _LANES),
        ),
        -1,
    )
    words = philox(counter, seed)  # (rows, blocks * lanes, 4)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1)  # (rows, blocks * lanes, 4, 2)
    draws = draws.reshape(rows, blocks, _LANES, _DRAWS).transpose(-1, -2)
    draws = draws.reshape(rows, blocks * _BLOCK)[:, :columns]
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return (draws >= threshold).to(torch.float64) * scale


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
    """Return ``x Wᵀ + b + s·(x ∘ M/(1-p)) Aᵀ Bᵀ`` in plain torch; see :func:`ops.lora_linear`."""
    y = F.linear(x, weight, bias)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed must be a 0-dim int64 tensor where dropout_p > 0, got None")
        in_features = weight.shape[1]
        rows = x.numel() // in_features if in_features else 0
        mask = dropout_mask(rows, in_features, dropout_p, seed.to(x.device))
        x = x * mask.to(x.dtype).reshape(x.shape)
    hidden = F.linear(x.to(lora_A.dtype), lora_A)
    return y + (scaling * F.linear(hidden, lora_B)).to(y.dtype)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return :func:`lora_linear` of each member; see :func:`ops.lora_linear_group`."""
    members = group_members(weights, biases, lora_As, lora_Bs, scalings, seeds)
    return [
        lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        for weight, bias, lora_A, lora_B, scaling, seed in members
    ]


def group_members(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    seeds: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor, float, Tensor | None]]:
    """Return what belongs to each member of a group; a single seed belongs to all.

    Raises:
        RuntimeError: The lists differ in length.
    """
    n = len(weights)
    named = {"biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings}
    for name, values in named.items():
        if len(values) != n:
            raise RuntimeError(
                f"{name} must have an entry for each of the {n} weights, got {len(values)}"
            )
    if len(seeds) not in (0, 1, n):
        raise RuntimeError(
            f"seeds must be none, one for all or one for each of the {n} weights, got {len(seeds)}"
        )
    each: list[Tensor | None] = [*seeds] if len(seeds) == n else [*seeds, None][:1] * n
    return list(zip(weights, biases, lora_As, lora_Bs, scalings, each, strict=True))


def lora_gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Tensor,
) -> Tensor:
    """Return ``x_n Wᵀ + b + s_i·x_n A_iᵀ B_iᵀ``, i = index[n]; see :func:`ops.lora_gather`.

    All adapters lie side by side, and each row keeps the columns of its own: no loop, nothing that
    depends on what ``index`` holds, so that it can be exported.
    """
    y = F.linear(x, weight, bias)
    if not lora_A:
        return y
    # No torch.tensor(): a constant made so cannot be exported.
    wide, device = lora_A[0].dtype, x.device
    owner = torch.cat([torch.full((a.shape[0],), i, device=device) for i, a in enumerate(lora_A)])
    scale = torch.cat(
        [
            torch.full((a.shape[0],), s, dtype=wide, device=device)
            for a, s in zip(lora_A, scaling, strict=True)
        ]
    )
    index = index.to(x.device).reshape(index.shape + (1,) * (x.dim() - index.dim()))
    own = torch.where(index == owner, scale, torch.zeros((), dtype=wide, device=device))
    hidden = F.linear(x.to(wide), torch.cat(list(lora_A))) * own
    return y + F.linear(hidden, torch.cat(list(lora_B), 1)).to(y.dtype)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
) -> Tensor:
    """Return ``W[t] + s·B A[:, t]`` of each token t; see :func:`ops.lora_embedding`."""
    # Not F.embedding: what it asks about padding_idx is not to be asked under torch.jit.trace.
    padding = -1 if padding_idx is None else padding_idx
    y = torch.embedding(weight, ids, padding)
    update = F.linear(torch.embedding(lora_A.mT, ids, padding), lora_B)
    return y + (update * scaling).to(y.dtype)


def dora_scale(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``gain ∘ y + bias``, of y's dtype; see :func:`ops.dora_scale`."""
    scaled = y * gain
    return (scaled if bias is None else scaled + bias).to(y.dtype)


@torch.no_grad()
def dora_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ``‖W_i + s·B_i A‖`` of each row, a constant; see :func:`ops.dora_row_norms`."""
    wide = norm_dtype(weight, lora_A, lora_B)
    w, a, b = weight.to(wide), lora_A.to(wide), lora_B.to(wide)
    products = (w @ a.mT) * (2.0 * scaling) + (b @ (a @ a.mT)) * (scaling * scaling)
    squares = torch.linalg.vector_norm(w, dim=1).square() + (products * b).sum(1)
    # Rounding may leave a row of zeros a little below zero.
    norms: Tensor = squares.clamp_min(0.0).sqrt()
    return norms


def norm_dtype(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """Return what norms of rows are computed in: float32, or float64 where a tensor is."""
    double = torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype)
    return torch.float64 if double else torch.float32


def rounding_bits(
    rows: int, columns: int, seed: Tensor, layer: int = 0, first_row: int = 0
) -> Tensor:
    """Return the 16 random bits of each entry that stochastic rounding adds.

    They are laid out as the draws of :func:`dropout_mask`, with ``layer + 1`` for the counter's
    fourth word, so that no two weights of a call share them.

    Returns:
        ``(rows, columns)`` int64, in [0, 2**16).
    """
    blocks = -(-columns // _BLOCK)
    lanes, row = torch.arange(blocks * _LANES), torch.arange(first_row, first_row + rows)
    counter = torch.stack(
        torch.broadcast_tensors(
            lanes, (row & _MASK32)[:, None], (row >> 32)[:, None], torch.tensor(layer + 1)
        ),
        -1,
    )
    words = philox(counter, seed.cpu())  # (rows, blocks * lanes, 4)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1).reshape(rows, blocks, _LANES, _DRAWS)
    return draws.transpose(-1, -2).reshape(rows, blocks * _BLOCK)[:, :columns]


def round_stochastic(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, the farther the rarer.

    The expectation is ``value`` (Gupta et al., arXiv:1502.02551, section 3). Infinity and NaN stay.

    Args:
        value: float32.
        dtype: bfloat16 or float16.
        bits: Random numbers in [0, 2**16), of value's shape; see :func:`rounding_bits`.
    """
    wide = value.double()
    least, digits = (2.0**-133, 8) if dtype == torch.bfloat16 else (2.0**-24, 11)
    step = torch.ldexp(torch.ones_like(wide), torch.frexp(wide).exponent - digits).clamp(min=least)
    below = torch.floor(wide.abs() / step)
    # float16 keeps 13 bits fewer than float32, so only as many of the random bits are seen there.
    share = bits if dtype == torch.bfloat16 else torch.where(step > least, bits >> 3 << 3, bits)
    up = wide.abs() / step - below > 1 - (share + 1) / 65536
    rounded = torch.copysign((below + up) * step, wide)
    return torch.where(wide.isfinite(), rounded, wide).to(dtype)


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``W + s·B A`` rounded once to W's dtype, and the update; see :func:`ops.merge_`.

    Args:
        weight: W, ``(out, in)``, or ``(in, out)`` where ``transposed``.
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scaling: s.
        transposed: Whether W and the update are transposed.
        bits: See :func:`round_stochastic`; None rounds to nearest.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = scaling * (lora_B.to(wide) @ lora_A.to(wide))
    if transposed:
        delta = delta.t()
    total = weight.to(wide) + delta
    if bits is None:
        return total.to(weight.dtype), delta
    return round_stochastic(total, weight.dtype, bits.to(weight.device)), delta
