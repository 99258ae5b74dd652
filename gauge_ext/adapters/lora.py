"""``nn.Linear`` with a low-rank adapter beside its frozen weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters import branches, recompute
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.spec import AdapterSpec, Init

if TYPE_CHECKING:
    from gauge_ext.adapters.shared_input import SharedInput


class LoRALinear(AdaptedLayer, nn.Linear):
    r"""A linear layer with a LoRA adapter (arXiv:2106.09685, equation 3).

    .. math:: y = x W^T + b + s\,(x \circ M / (1 - p))\, A^T B^T

    M is a dropout mask with probability p in training and all ones in evaluation. The base keeps
    the names ``weight`` (out, in) and ``bias`` (out,), so a state dict of the base still loads;
    beside them lie ``lora_A`` (rank, in) and ``lora_B`` (out, rank). The layer is still an
    ``nn.Linear`` to all who ask, and the same object as before when made by :meth:`from_linear`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether the base has a bias.
        rank: r, at least 1.
        scaling: s.
        dropout: p, in [0, 1).
        init: How lora_A starts, see :class:`~gauge_ext.adapters.LoRAConfig`; lora_B starts at zero.
        adapter_dtype: Dtype of lora_A and lora_B; None: float32 on half-precision bases, else the
            base's own.
        use_dora: Whether the adapter is a DoRA, with ``lora_magnitude`` (out,).
        lora_bias: Whether the branch has a bias, ``lora_bias`` (out,).
        device: Device of all parameters.
        dtype: Dtype of the base.

    Attributes:
        scaling: s, applied to the product of the factors.
        dropout_p: p.
        merged: Whether ``weight`` holds the update, so that the branch is left out of ``forward``.
        shared_input: The layers that are computed together with this one, see
            :func:`gauge_ext.models.group_shared_inputs`; None where it is by itself.
    """

    bases = (nn.Linear,)
    base_class: ClassVar[type[nn.Module]] = nn.Linear
    is_linear = True
    shared_input: SharedInput | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: Init = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(
            AdapterSpec(rank, scaling, dropout, init, adapter_dtype, use_dora, lora_bias)
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        scaling: float = 1.0,
        dropout: float = 0.0,
        init: Init = "kaiming",
        dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """Turn ``linear`` itself into a LoRALinear and return it.

        Its class is exchanged in place: identity, hooks, parameters and their ``requires_grad``
        stay, and whoever holds the layer now holds the adapted one.

        Args:
            linear: A layer for which :func:`~gauge_ext.adapters.unsupported_reason` is None.
            rank: See :class:`LoRALinear`, as for the arguments below.
            scaling: s.
            dropout: p.
            init: How lora_A starts.
            dtype: Dtype of lora_A and lora_B (``adapter_dtype`` above).

        Raises:
            TargetError: The layer's forward is not, or not only, that of ``nn.Linear``.
            ConfigError: A number cannot be used.
        """
        return cls.adapt(linear, AdapterSpec(rank, scaling, dropout, init, dtype))

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Say why ``module`` cannot carry the adapter, or return None where it can."""
        kind = type(module)
        if kind is not nn.Linear and isinstance(module, nn.Linear):
            if isinstance(module, AdaptedLayer):
                return "it has an adapter already"
            if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                return "nn.MultiheadAttention reads the weight of its out_proj and never calls it"
            name = f"{kind.__module__}.{kind.__qualname__}"
            return f"{name} is a subclass of nn.Linear, which may compute something else"
        return super().reason_against(module)

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, in)`` and ``(out, rank)``."""
        return (rank, module.in_features), (module.out_features, rank)

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            input: x, ``(*batch, in)``.

        Returns:
            ``(*batch, out)``.
        """
        group = self.shared_input
        if group is not None and not torch.compiler.is_compiling():
            shared = group.forward(self, input)
            if shared is not None:
                return shared
        if self.recomputes_input:
            return recompute.call(self._output, input)
        return self._output(input)

    def _output(self, input: Tensor) -> Tensor:
        # nn.Module.__getattr__ costs about a microsecond for each parameter: look once.
        p: dict[str, Any] = self._parameters
        try:
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:  # torch.nn.utils.parametrize and prune move a parameter elsewhere
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        if not self.has_branch:
            return F.linear(input, weight, bias)
        if not self.is_plain:
            return branches.linear(self, input, weight, bias)
        if self.training and self.dropout_p > 0.0:
            seed = ops.draw_seed()
            return ops.lora_linear(
                input, weight, bias, lora_A, lora_B, self.scaling, self.dropout_p, seed
            )
        return ops.lora_linear(input, weight, bias, lora_A, lora_B, self.scaling)

    def to_base(self) -> nn.Module:
        """Drop the adapter and be a plain layer again, with the weight of the moment."""
        vars(self).pop("shared_input", None)
        return super().to_base()

    def __getstate__(self) -> Any:
        # A group is of these very layers: copies and pickles are by themselves.
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "shared_input"}
