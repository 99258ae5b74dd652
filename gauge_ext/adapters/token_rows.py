r"""Trained tokens where each row of a batch has those of its own adapter.

For sample i with the adapter k, whose tokens :math:`T_k` have the rows :math:`R_k`,

.. math::
    y_{i,t} = \begin{cases} R_{k,t} & t \in T_k \\ W_t & \text{else} \end{cases}
    \qquad
    z_{i,t} = \begin{cases} x_i \cdot R_{k,t} + b_t & t \in T_k \\ x_i \cdot W_t + b_t &
    \text{else} \end{cases}

for the embedding of a token t and for the output t of a tied linear layer. W is looked up, or
multiplied, once for all samples, and no table is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters.rows import Apart

if TYPE_CHECKING:
    from gauge_ext.adapters.parameter import LoRAHolder
    from gauge_ext.adapters.tokens import TrainedTokens


def is_known(owner: LoRAHolder) -> bool:
    """Say whether an owner computes what is written above, and nothing else."""
    if owner.held_class is not nn.Embedding:
        return owner.held_class is nn.Linear
    embedding = cast("nn.Embedding", owner)
    # A gradient scaled by the counts of the tokens needs those of each table alone.
    return embedding.max_norm is None and not embedding.scale_grad_by_freq


def patched(holder: TrainedTokens, owner: LoRAHolder, split: Apart, x: Tensor, y: Tensor) -> Tensor:
    """Return an owner's output with the tokens of each sample's adapter in it.

    Args:
        holder: The tokens.
        owner: A module for which :func:`is_known` is true.
        split: Which samples have which adapter.
        x: Ids ``(batch, *)`` of an embedding, or the input ``(batch, *, dim)`` of a linear layer.
        y: What the owner makes of it with W, ``(batch, *, dim)`` or ``(batch, *, vocab)``; may be
            written to.

    Returns:
        An output of the shape and dtype of y.
    """
    if owner.held_class is nn.Linear:
        return _logits(holder, owner, split, x, y)
    return _looked_up(holder, owner, split, x, y)


def _looked_up(
    holder: TrainedTokens, owner: LoRAHolder, split: Apart, ids: Tensor, y: Tensor
) -> Tensor:
    vocab = holder.base_weight.shape[0]
    keys: list[Tensor] = []
    tables: list[Tensor] = []
    for name, _ in split.groups:
        if name is not None:
            slot = holder.adapter(name)
            keys.append(slot.get_buffer("indices") + vocab * split.rows.names.index(name))
            tables.append(slot.get_parameter("trainable_tokens_delta"))
    # A token of an adapter is one number, which tells where its row is among all.
    known, order = torch.cat(keys).sort()
    number = split.rows.numbers.to(ids.device).view(-1, *(1,) * (ids.dim() - 1))
    wanted = torch.where(number < 0, -1, ids + vocab * number)
    place = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
    found = F.embedding(order[place], torch.cat(tables)).to(y.dtype)
    padding = cast("nn.Embedding", owner).padding_idx
    if padding is not None:  # whose row gets no gradient
        found = torch.where(ids.eq(padding).unsqueeze(-1), found.detach(), found)
    return torch.where(known[place].eq(wanted).unsqueeze(-1), found, y)


def _logits(holder: TrainedTokens, owner: LoRAHolder, split: Apart, x: Tensor, y: Tensor) -> Tensor:
    bias = cast("nn.Linear", owner).bias
    flat = y.view(len(y), -1, y.shape[-1])
    between = torch.arange(flat.shape[1], device=y.device)[:, None]
    for name, rows in split.groups:
        if name is not None:
            slot = holder.adapter(name)
            place = slot.get_buffer("indices")
            table = slot.get_parameter("trainable_tokens_delta").to(holder.base_weight.dtype)
            here = rows.to(x.device)
            values = F.linear(x[here], table, None if bias is None else bias[place])
            values = values.view(len(here), -1, len(place)).to(y.dtype)
            flat[here[:, None, None], between, place] = values
    return y
