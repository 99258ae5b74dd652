"""``nn.Embedding`` with a low-rank adapter beside its frozen table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters.additive import AdditiveLayer
from gauge_ext.adapters.branches import Branch
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.spec import AdapterSpec
from gauge_ext.adapters.tied import TiedLinear, become_tied

# What the compiled op takes; in other dtypes, float16 on the CPU among them, torch's operators run.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class LoRAEmbedding(AdditiveLayer, nn.Embedding):
    r"""An embedding with a LoRA adapter.

    .. math:: y_t = W_t + s\,(A^T)_t\, B^T

    for a token t, with the table W (vocab, dim), ``lora_A`` (r, vocab) and ``lora_B`` (dim, r). An
    embedding is a linear layer of one-hot inputs, so dropping an input drops the update of a token
    at its place. A starts at zero and B normal, as in loralib and PEFT.

    ``padding_idx`` and ``scale_grad_by_freq`` hold for lora_A as they do for a table: the padding
    token's column gets no gradient. ``sparse`` holds for the table alone: a column of lora_A is no
    row of a sparse tensor, and its gradient is dense.

    Linear layers that share the table can share the adapters too, see :meth:`tie`.
    """

    bases = (nn.Embedding,)
    base_class: ClassVar[type[nn.Module]] = nn.Embedding
    kind: ClassVar[Kind] = "embedding"
    output_axis = 1

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Say why ``module`` cannot carry the adapter, or return None where it can."""
        reason = super().reason_against(module)
        if reason is None and getattr(module, "max_norm", None) is not None:
            return "its max_norm rewrites the frozen table in every forward"
        return reason

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, vocab)`` and ``(dim, rank)``."""
        return (rank, module.num_embeddings), (module.embedding_dim, rank)

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        if spec.lora_bias:
            return "an embedding has no bias (lora_bias)"
        return super().reason_against_spec(module, spec)

    def start_factors(self, lora_A: Tensor, lora_B: Tensor, spec: AdapterSpec) -> None:
        """Fill A with zeros and B with draws of N(0, 1)."""
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    @property
    def heads(self) -> tuple[TiedLinear, ...]:
        """The linear layers that have the adapters too."""
        return cast("tuple[TiedLinear, ...]", vars(self).get("_heads", ()))

    def tie(self, head: nn.Linear) -> None:
        """Give a linear layer with the same weight all adapters that are here, or will be."""
        self._heads = (*self.heads, become_tied(head, self))

    def adopt_merged(self, merged: Mapping[str, Tensor], *, keep_base: bool) -> None:
        """Make ``merged`` the table of all layers that are tied to this one."""
        super().adopt_merged(merged, keep_base=keep_base)
        self._share()

    def unmerge(self) -> None:
        """Put the base's own table back, in all layers that are tied to this one."""
        super().unmerge()
        self._share()

    def _share(self) -> None:
        for head in self.heads:
            head.weight = self.weight

    def to_base(self) -> nn.Module:
        """Drop the adapters, of the layers tied to this one too, and be a plain embedding again."""
        for head in vars(self).pop("_heads", ()):
            head.to_base()
        return super().to_base()

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``(B A)ᵀ``, ``(vocab, dim)``."""
        return torch.mm(lora_A.mT, lora_B.mT)

    def matrices(self, slot: AdapterSlot) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table transposed, ``(dim, vocab)``, and A and B of an adapter."""
        return self.weight.mT, *slot.factors()

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted embedding's rows.

        Args:
            input: Indices, ``(*)``.

        Returns:
            ``(*, dim)``.
        """
        if not self.has_branch:
            return self._rows(input, self.weight, sparse=self.sparse)
        if not self._is_one_pass():
            return self.adapted_output(input, None)
        factors = self.lora_A, self.lora_B
        return ops.lora_embedding(input, self.weight, *factors, self.scaling, self.padding_idx)

    def _is_one_pass(self) -> bool:
        """Whether :func:`gauge_ext.ops.lora_embedding` computes all that this layer does."""
        drops = self.training and self.dropout_p > 0.0
        if not self.is_plain or drops or self.scale_grad_by_freq or self.weight.requires_grad:
            return False
        dtype, factors = self.weight.dtype, (self.lora_A.dtype, self.lora_B.dtype)
        return dtype in _DTYPES and factors in ((dtype,) * 2, (torch.float32,) * 2)

    def base_output(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """Return the rows of the table; there is no bias."""
        return self._rows(x, self.weight, sparse=self.sparse)

    def branch_output(self, x: Tensor, branch: Branch) -> Tensor:
        """Return the rows of the update, gathered at rank r: ``(*, dim)``."""
        hidden = self._rows(x, branch.lora_A.mT, sparse=False)
        if branch.dropout_p > 0.0:
            hidden = hidden * F.dropout(hidden.new_ones(*x.shape, 1), branch.dropout_p)
        return F.linear(hidden, branch.lora_B)

    def _rows(self, input: Tensor, table: Tensor, *, sparse: bool) -> Tensor:
        return F.embedding(
            input,
            table,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=sparse,
        )
