"""A linear layer that shares its weight, and the adapters on it, with an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters import branches
from gauge_ext.adapters.branches import Branch
from gauge_ext.adapters.rows import require_samples

if TYPE_CHECKING:
    from gauge_ext.adapters.embedding import LoRAEmbedding


class TiedLinear(nn.Linear):
    r"""An output layer whose weight is the table of an adapted embedding, and stays it.

    .. math:: W + s\,(B A)^T \quad (vocab, dim), \qquad y = x W^T + b + s\,(\tilde x B)\,A

    with the embedding's W, A (r, vocab) and B (dim, r): the layer's own factors would be
    :math:`B^T` (r, dim) and :math:`A^T` (vocab, r). It has no parameters of an adapter; those of
    the embedding get the gradients of both, and whatever is done to the embedding's adapters, a
    merge, another choice of them, is done to both. It becomes one by the exchange of its class, see
    :meth:`~gauge_ext.adapters.embedding.LoRAEmbedding.tie`.
    """

    # How its share of an adapter lies in a file.
    kind: ClassVar[Literal["linear"]] = "linear"
    # In a tuple, so that the embedding does not become a submodule.
    _source: tuple[LoRAEmbedding]

    @property
    def source(self) -> LoRAEmbedding:
        """The embedding."""
        return self._source[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the embedding's adapters.

        Args:
            input: x, ``(*batch, dim)``.

        Returns:
            ``(*batch, vocab)``.

        Raises:
            AdapterStateError: Each row has an adapter of its own, in training with dropout.
            ConfigError: It has, and x has another number of rows.
        """
        source, weight, bias = self.source, self.weight, self.bias
        if not source.has_branch:
            return F.linear(input, weight, bias)
        if source.rows is not None:
            slots = branches.slots_of_rows(source, source.rows)
            require_samples(input, source.rows)
            lora_A, lora_B = [s.lora_B.mT for s in slots], [s.lora_A.mT for s in slots]
            scalings = [slot.scaling for slot in slots]
            return ops.lora_gather(
                input, weight, bias, lora_A, lora_B, scalings, source.rows.numbers
            )
        first, *others = (_turned(branch) for branch in source.working()[0])
        y = branches.fused(input, weight, bias, first)
        for branch in others:
            y = y + (branches.low_rank(input, branch) * branch.scaling).to(y.dtype)
        return y

    def to_base(self) -> nn.Linear:
        """Be a plain layer again, with the weight of the moment."""
        del vars(self)["_source"]
        base = cast("nn.Linear", self)
        base.__class__ = nn.Linear
        return base


def become_tied(head: nn.Linear, source: LoRAEmbedding) -> TiedLinear:
    """Turn ``head`` itself into a layer that has the adapters of ``source``."""
    head.__class__ = TiedLinear
    tied = cast("TiedLinear", head)
    tied._source = (source,)
    return tied


def _turned(branch: Branch) -> Branch:
    """An embedding's branch as one of the linear layer with the same table."""
    return branch._replace(lora_A=branch.lora_B.mT, lora_B=branch.lora_A.mT)
