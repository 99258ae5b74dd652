"""A few rows of an embedding that are trained whole: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from gauge_ext.adapters import token_rows
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.merging import adapter_dtype
from gauge_ext.adapters.parameter import (
    LoRAHolder,
    become_holder,
    leave_holder,
    reason_against_parameter,
)
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.row_groups import by_groups
from gauge_ext.adapters.rows import (
    Apart,
    apart,
    only_name,
    read_apart,
    require_samples,
)
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
    further adapter may train tokens of its own, or the same. Where each row of a batch has an
    adapter of its own, W is looked up, or multiplied, once for all of them, see
    :mod:`~gauge_ext.adapters.token_rows`; a module that is no plain embedding or linear layer is
    called once for each adapter.

    Args:
        owners: The module that holds W, and those that share it.
        indices: The tokens.
        name: What the adapter is called that they belong to.

    Raises:
        TargetError: A module cannot carry it, or a token is beyond the table.
    """

    kind: ClassVar[Kind] = "tokens"
    indices: Tensor
    trainable_tokens_delta: nn.Parameter
    _of_all_rows: str | None

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
        """Return the table with the rows in it, differentiable in them, or the bare table.

        Raises:
            AdapterStateError: Samples of a batch have tables of their own.
        """
        if self.apart is not None:
            raise read_apart(self.apart.rows, self.weight_name)
        if not self.has_branch:
            return self.base_weight
        if self.rows is not None:
            return self.table_of(self._of_all_rows)
        return self._with_rows(self.present())

    def table_of(self, name: str | None) -> Tensor:
        """Return the table with the rows of one adapter in it, or the bare table."""
        return self._with_rows([] if name is None else [(self.adapter(name), 1.0)])

    def _with_rows(self, chosen: Sequence[tuple[AdapterSlot, float]]) -> Tensor:
        table, weight = self.base_weight, self.base_weight
        done: set[int] = set()
        for slot, number in chosen:
            place = slot.get_buffer("indices")
            rows = slot.get_parameter("trainable_tokens_delta").to(weight.dtype)
            if not done.isdisjoint(slot.tokens):  # the same tokens by several adapters
                rows = table[place] + number * (rows - weight[place])
            elif number != 1.0:  # of the way from the base's rows to these
                rows = torch.lerp(weight[place], rows, number)
            table = table.index_copy(0, place, rows)
            done.update(slot.tokens)
        return table

    def call_by_rows(
        self,
        owner: LoRAHolder,
        adapted: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return what an owner returns where samples of the batch have tables of their own.

        Args:
            owner: One of those that share the table.
            adapted: What else stands in the place of parameters of it.
            args: Its arguments, as in :func:`~gauge_ext.adapters.row_groups.by_groups`.
            kwargs: The others.
        """
        split = cast("Apart", self.apart)
        if not adapted and len(args) == 1 and not kwargs and token_rows.is_known(owner):
            require_samples(args[0], split.rows)
            y: Tensor = owner.forward_with({}, args[0])
            return token_rows.patched(self, owner, split, args[0], y)

        def call(name: str | None, *args: Any, **kwargs: Any) -> Any:
            table = {self.weight_name: self.table_of(name)}
            return owner.forward_with({**adapted, **table}, *args, **kwargs)

        return by_groups(self, owner, split, call, args, kwargs)

    def settle(self) -> None:
        """Say anew what forward has to do, and which tables the samples of a batch ask for."""
        super().settle()
        rows = self.rows
        # In forward a compiler could not follow the numbers in the rows.
        self._of_all_rows = None if rows is None else only_name(rows)
        self.apart = apart(rows) if rows is not None and self.has_branch else None

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """Return the rows of the first adapter."""
        return dict(self.trained())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the table with the rows minus the one without, ``(vocab, dim)``."""
        return self._with_rows(self.present()) - self.base_weight

    @torch.no_grad()
    def merged_parameters(self, *, safe: bool = True) -> dict[str, Tensor]:
        """Return the table with the rows in it.

        Raises:
            NonFiniteError: A row holds NaN or infinity.
            AdapterStateError: It is merged already.
        """
        if self.merged:
            raise AdapterStateError("the layer is merged already.", hint="Call unmerge() first.")
        merged = self._with_rows(self.present())
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
