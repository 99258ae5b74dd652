"""A few rows of an embedding that are trained whole: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.merging import adapter_dtype
from gauge_ext.adapters.parameter import become_holder, leave_holder, reason_against_parameter
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.errors import AdapterStateError, NonFiniteError, TargetError

TOKENS = "token_adapter"


class TrainedTokens(AdaptedLayer):
    r"""Rows that stand in the place of some rows of a table W ``(vocab, dim)``.

    With weights :math:`w_k` of the active adapters, row t is

    .. math:: W_t + \sum_k w_k (R_{k,t} - W_t)

    over those that train the token t.

    It is the submodule ``token_adapter`` of the embedding. Layers that share W, such as a tied
    output embedding, read the same rows and stay tied. The rows R are ``trainable_tokens_delta``
    ``(n, dim)``, values and not differences, which start as W's own; W is never written to. Each
    further adapter may train tokens of its own, or the same.

    Args:
        owners: The module that holds W, and those that share it.
        indices: The tokens.
        name: What the adapter is called that they belong to.

    Raises:
        TargetError: A module cannot carry it, or a token is beyond the table.
    """

    kind: ClassVar[Kind] = "tokens"
    rows_refusal = "the rows of trained tokens stand in one table for the whole batch"
    indices: Tensor
    trainable_tokens_delta: nn.Parameter

    def __init__(
        self, owners: Sequence[nn.Module], indices: Sequence[int], name: str = DEFAULT
    ) -> None:
        super().__init__()
        self._owners = tuple(owners)
        for owner in owners:
            if reason := reason_against_parameter(owner, "weight"):
                raise TargetError(
                    f"tokens of this {type(owner).__name__} can't be trained: {reason}."
                )
        self._start_rows(self, indices)
        self.merged, self._kept, self.own_name = False, {}, name
        self.set_active([(name, 1.0)])
        for owner in owners:
            become_holder(owner)
            vars(owner)["_tied"] = (self,)
        owners[0].add_module(TOKENS, self.train(owners[0].training))

    def _start_rows(self, slot: AdapterSlot, indices: Sequence[int]) -> None:
        """Give a slot the rows that the table has for these tokens."""
        weight = self.base_weight
        if weight.dim() != 2 or max(indices) >= weight.shape[0]:
            raise TargetError(
                f"trainable_token_indices goes up to {max(indices)}, and the table's shape is "
                f"{tuple(weight.shape)}.",
                hint="Resize the model's embeddings first.",
            )
        place = torch.tensor(indices, device=weight.device)
        rows = weight.detach()[place].to(adapter_dtype(weight.dtype), copy=True)
        slot.register_buffer("indices", place, persistent=False)
        slot.trainable_tokens_delta, slot.tokens = nn.Parameter(rows), tuple(indices)
        slot.scaling, slot.dropout_p = 1.0, 0.0
        slot._factor_names, slot._start_names = ("trainable_tokens_delta",), ()

    def add_rows(self, name: str, indices: Sequence[int]) -> None:
        """Put rows of a further adapter beside those that are there; they don't work yet.

        Raises:
            TargetError: A token is beyond the table.
        """
        slot = AdapterSlot()
        self._start_rows(slot, indices)
        self.put_beside(name, slot)

    def take(self, other: AdapterSlot) -> Self:
        """Become what ``other`` is, with its tokens."""
        self.indices, self.tokens = other.get_buffer("indices"), other.tokens
        return super().take(other)

    @property
    def owner(self) -> nn.Module:
        """The embedding."""
        return self._owners[0]

    @property
    def rank(self) -> int:
        """The number of the first adapter's tokens."""
        return self.trainable_tokens_delta.shape[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the table with the rows in it, differentiable in them, or the bare table."""
        return self._with_rows() if self.has_branch else self.base_weight

    def _with_rows(self) -> Tensor:
        table, weight = self.base_weight, self.base_weight
        done: set[int] = set()
        for slot, number in self.present():
            place = slot.get_buffer("indices")
            rows = slot.get_parameter("trainable_tokens_delta").to(weight.dtype)
            if not done.isdisjoint(slot.tokens):  # the same tokens by several adapters
                rows = table[place] + number * (rows - weight[place])
            elif number != 1.0:  # of the way from the base's rows to these
                rows = torch.lerp(weight[place], rows, number)
            table = table.index_copy(0, place, rows)
            done.update(slot.tokens)
        return table

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return the rows of the first adapter."""
        return dict(self.trained())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the table with the rows minus the one without, ``(vocab, dim)``."""
        return self._with_rows() - self.base_weight

    @torch.no_grad()
    def merged_parameters(self, *, safe: bool = True) -> dict[str, Tensor]:
        """Return the table with the rows in it.

        Raises:
            NonFiniteError: A row holds NaN or infinity.
            AdapterStateError: It is merged already.
        """
        if self.merged:
            raise AdapterStateError("the layer is merged already.", hint="Call unmerge() first.")
        merged = self._with_rows()
        if safe and not bool(merged.isfinite().all()):
            raise NonFiniteError("trainable_tokens_delta, or the table, holds NaN or infinity.")
        return {self.weight_name: merged}

    def adopt_merged(self, merged: Mapping[str, Tensor], *, keep_base: bool) -> None:
        """Make ``merged`` the table of all layers that share it."""
        super().adopt_merged(merged, keep_base=keep_base)
        self._share()

    def unmerge(self) -> None:
        """Put the base's own table back, in all layers that share it."""
        super().unmerge()
        self._share()

    def _share(self) -> None:
        for other in self._owners[1:]:
            other.weight = cast("nn.Parameter", self.base_weight)

    def to_base(self) -> nn.Module:
        """Take the rows off, with the table of the moment, and return the embedding."""
        del self.owner._modules[TOKENS]
        for owner in self._owners:
            del vars(owner)["_tied"]
            leave_holder(owner)
        return self.owner

    def extra_repr(self) -> str:
        """Say how many tokens, of which table."""
        tied = len(self._owners) - 1
        return f"{self.rank} of {tuple(self.base_weight.shape)}" + (
            f", tied {tied}" if tied else ""
        )
