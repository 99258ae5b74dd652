"""``nn.MultiheadAttention`` with adapters on its input and output projections."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gauge_ext.adapters import branches
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.spec import AdapterSpec

_NO_ROWS = "nn.MultiheadAttention takes the same adapters for a whole batch, as in PEFT"


class LoRAOutProjection(AdaptedLayer, NonDynamicallyQuantizableLinear):
    """The output projection of an adapted attention, which calls it; torch's own does not."""

    bases = (NonDynamicallyQuantizableLinear,)
    base_class: ClassVar[type[nn.Module]] = NonDynamicallyQuantizableLinear
    kind: ClassVar[Kind] = "out_proj"
    is_linear = True
    rows_refusal = _NO_ROWS

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, in)`` and ``(out, rank)``."""
        return (rank, module.in_features), (module.out_features, rank)

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        return _reason_against_spec(spec)

    def forward(self, input: Tensor) -> Tensor:
        """Return the projection of x, ``(*batch, in)``, with the update: ``(*batch, out)``."""
        return _project(self, input, self.weight, self.bias)


class LoRAMultiheadAttention(AdaptedLayer, nn.MultiheadAttention):
    r"""Multi-head attention with LoRA on the stacked projections of query, key and value.

    .. math:: W_{in} + s\,B A, \qquad W_{in} = [W_q; W_k; W_v]

    with ``lora_A`` (r, d) and ``lora_B`` (3 d, r): the three projections share A. The output
    projection is adapted along with it, as :class:`LoRAOutProjection`.

    The base is never written to. torch's fused inference kernel reads the weights alone, so it is
    used only where they are merged; otherwise the attention is computed here, with the same masks,
    biases and weights returned as in torch.
    """

    bases = (nn.MultiheadAttention,)
    base_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    weight_name = "in_proj_weight"
    companions: ClassVar[tuple[str, ...]] = ("out_proj",)
    rows_refusal = _NO_ROWS

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Say why ``module`` cannot carry the adapter, or return None where it can."""
        if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            return (
                "its key or value has another size than its query, and so weights of their own, "
                "which target_parameters can name (q_proj_weight, k_proj_weight, v_proj_weight, "
                "out_proj.weight)"
            )
        return super().reason_against(module)

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        return _reason_against_spec(spec)

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, d)`` and ``(3 d, rank)``."""
        return (rank, module.embed_dim), (3 * module.embed_dim, rank)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and attention weights; see ``nn.MultiheadAttention.forward``."""
        out_proj = cast("LoRAOutProjection", self.out_proj)
        if not (self.has_branch or out_proj.has_branch):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = self._projections(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        k, v, mask = self._extended(k, v, mask)
        heads, probabilities = self._attend(q, k, v, mask, need_weights)
        output = out_proj(heads)
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if probabilities is None:
            return output, None
        if average_attn_weights:
            probabilities = probabilities.mean(1)
        return output, probabilities if batched else probabilities.squeeze(0)

    def _projections(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; inputs that are one tensor are multiplied once."""

        def project(x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
            rows = slice(first * self.embed_dim, last * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            weight = cast("Tensor", self.in_proj_weight)[rows]
            return _project(self, x, weight, bias, rows).chunk(last - first, -1)

        if query is key and key is value:
            q, k, v = project(query, 0, 3)
            return q, k, v
        (q,) = project(query, 0, 1)
        if key is value:
            k, v = project(key, 1, 3)
        else:
            (k,), (v,) = project(key, 1, 2), project(value, 2, 3)
        return q, k, v

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one that is added to the scores, broadcasting to (N, heads, L, S)."""
        masks = []
        if key_padding_mask is not None:
            masks.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
        if attn_mask is not None:
            added = _additive(attn_mask, q.dtype)
            if added.dim() == 3:
                added = added.view(q.shape[0], self.num_heads, q.shape[1], k.shape[1])
            masks.append(added)
        return sum(masks[1:], masks[0]) if masks else None

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that bias_k, bias_v and add_zero_attn add at the end."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, bias.expand(t.shape[0], -1, -1)], 1)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            more += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], 1) for t in (k, v))
            more += 1
        if mask is not None and more:
            mask = F.pad(mask, (0, more))
        return k, v, mask

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs side by side, ``(N, L, d)``, and weights ``(N, heads, L, S)``."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v)
        )
        dropout = self.dropout if self.training else 0.0
        probabilities = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            probabilities = torch.softmax(scores if mask is None else scores + mask, -1)
            probabilities = F.dropout(probabilities, dropout) if dropout > 0.0 else probabilities
            heads = probabilities @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return heads.transpose(1, 2).flatten(2), probabilities


def _reason_against_spec(spec: AdapterSpec) -> str | None:
    if spec.init not in ("kaiming", "gaussian"):
        return f"nn.MultiheadAttention starts with B = 0, not with init {spec.init!r}"
    for field in ("use_dora", "lora_bias"):
        if getattr(spec, field):
            return f"nn.MultiheadAttention takes plain adapters only, without {field}, as in PEFT"
    return None


def _project(
    layer: AdaptedLayer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: slice | None = None,
) -> Tensor:
    if not layer.has_branch:
        return F.linear(x, weight, bias)
    return branches.linear(layer, x, weight, bias, outputs)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask whose True hides a place as one that is added, and any other in ``dtype``."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
