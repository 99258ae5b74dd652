r"""How the factors of an adapter start.

Every start leaves what the layer computes as it was. Where B A is zero from the start that is so by
itself. Where it is not (PiSSA, OLoRA, LoRA-GA), the adapter keeps a constant copy B0 A0 of its
start and counts as :math:`s\,(B A - B_0 A_0)`: the same as an adapter on the residual base
:math:`W - s\,B_0 A_0`, of which there is no rounded copy, and W is as it was.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gauge_ext.adapters.spec import Init
from gauge_ext.errors import ConfigError

_OVERSAMPLING = 10  # of the randomized decomposition, beside the rank
_EVERY_SVD = "pissa_niter_"


def starts_nonzero(init: Init) -> bool:
    """Say whether an init makes a product B A that is not zero."""
    return init == "olora" or init.startswith("pissa")


@torch.no_grad()
def start(lora_A: Tensor, lora_B: Tensor, init: Init, weight: Tensor, scaling: float) -> None:
    r"""Fill the factors of a linear layer.

    - "kaiming", "gaussian": A uniform in ±1/sqrt(in), or normal with deviation 1/r; B zero.
    - "orthogonal": A and B random in complementary halves of the r directions, so that B A = 0.
    - "pissa" (arXiv:2404.02948): the r largest singular triples of W,
      :math:`B = U_r \sqrt{S_r / s},\ A = \sqrt{S_r / s}\,V_r^T`; "pissa_niter_4" finds them by a
      randomized decomposition with 4 power iterations.
    - "olora" (arXiv:2406.01775): the first r columns and rows of W = Q R.

    Args:
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        init: Which.
        weight: W, ``(out, in)``.
        scaling: s.

    Raises:
        ConfigError: The rank does not suit the init: above the sides of W, or odd for "orthogonal".
    """
    rank = lora_A.shape[0]
    if init == "gaussian":
        nn.init.normal_(lora_A, std=1.0 / rank)
        nn.init.zeros_(lora_B)
    elif init == "orthogonal":
        _start_orthogonal(lora_A, lora_B)
    elif starts_nonzero(init):
        if rank > min(weight.shape):
            raise ConfigError(
                f"init {init!r} takes at most min(out, in) = {min(weight.shape)} directions from a "
                f"weight of shape {tuple(weight.shape)}, and the rank is {rank}.",
                hint="Lower it for these layers with rank_pattern.",
            )
        if scaling <= 0.0:
            raise ConfigError(f"init {init!r} needs a scaling above 0, got {scaling}.")
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        b, a = _olora(wide, rank) if init == "olora" else _pissa(wide, rank, init, scaling)
        lora_A.copy_(a)
        lora_B.copy_(b)
    else:
        fan_in = lora_A[0].numel()
        bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(lora_A, -bound, bound)
        nn.init.zeros_(lora_B)


def _start_orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    rank = lora_A.shape[0]
    if rank % 2:
        raise ConfigError(f"init 'orthogonal' needs an even rank, got {rank}.")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=lora_A.device)

    q, _ = torch.linalg.qr(draw(rank, rank))
    a = draw(lora_A.shape[1], rank // 2) @ q[0::2] / 10.0
    b = draw(lora_B.shape[0], rank // 2) @ q[1::2] / 10.0
    lora_A.copy_(a.mT)
    lora_B.copy_(b)


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def _pissa(weight: Tensor, rank: int, init: str, scaling: float) -> tuple[Tensor, Tensor]:
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        size = min(rank + _OVERSAMPLING, *weight.shape)
        u, s, v = torch.svd_lowrank(weight, q=size, niter=int(init.removeprefix(_EVERY_SVD)))
        vh = v.mT
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
