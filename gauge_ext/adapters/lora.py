"""``nn.Linear`` with a low-rank adapter beside its frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters.config import Init
from gauge_ext.adapters.merging import accumulation_dtype, adapter_dtype, add_update
from gauge_ext.adapters.support import unsupported_reason
from gauge_ext.errors import AdapterStateError, ConfigError, TargetError


class LoRALinear(nn.Linear):
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
        device: Device of all parameters.
        dtype: Dtype of the base.

    Attributes:
        scaling: s, applied to the product of the factors.
        dropout_p: p.
        merged: Whether ``weight`` holds the update, so that the branch is left out of ``forward``.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout_p: float
    merged: bool
    # The base's own Parameter while merged, in a tuple: nn.Module would register a bare one.
    _kept_weight: tuple[nn.Parameter, ...]

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
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(rank, scaling, dropout, init, adapter_dtype)

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
        if reason := unsupported_reason(linear):
            raise TargetError(f"an adapter cannot be put on this layer: {reason}.")
        layer = cast("LoRALinear", linear)
        layer.__class__ = cls
        try:
            layer._add_adapter(rank, scaling, dropout, init, dtype)
        except BaseException:
            linear.__class__ = nn.Linear
            raise
        return layer

    def _add_adapter(
        self, rank: int, scaling: float, dropout: float, init: Init, dtype: torch.dtype | None
    ) -> None:
        if rank < 1:
            raise ConfigError(f"rank must be at least 1, got {rank}.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {dropout}.")
        if not math.isfinite(scaling):
            raise ConfigError(f"scaling must be a finite number, got {scaling}.")
        weight = self.weight
        if dtype is None:
            dtype = adapter_dtype(weight.dtype)
        a = torch.empty(rank, self.in_features, dtype=dtype, device=weight.device)
        b = torch.zeros(self.out_features, rank, dtype=dtype, device=weight.device)
        if init == "gaussian":
            nn.init.normal_(a, std=1.0 / rank)
        else:
            bound = 1.0 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(a, -bound, bound)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scaling = float(scaling)
        self.dropout_p = float(dropout)
        self.merged = False
        self._kept_weight = ()

    @property
    def rank(self) -> int:
        """The number of rows of lora_A."""
        return self.lora_A.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            input: x, ``(*batch, in)``.

        Returns:
            ``(*batch, out)``.
        """
        # nn.Module.__getattr__ costs about a microsecond for each parameter: look once.
        p: dict[str, Any] = self._parameters
        try:
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        except KeyError:  # torch.nn.utils.parametrize and prune move a parameter elsewhere
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        if self.merged:
            return F.linear(input, weight, bias)
        if self.training and self.dropout_p > 0.0:
            seed = ops.draw_seed()
            return ops.lora_linear(
                input, weight, bias, lora_A, lora_B, self.scaling, self.dropout_p, seed
            )
        return ops.lora_linear(input, weight, bias, lora_A, lora_B, self.scaling)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ``scaling * lora_B @ lora_A``, ``(out, in)``.

        It is accumulated in float32, or in float64 where the base or a factor is float64, and has
        that dtype.
        """
        a, b = self.lora_A, self.lora_B
        dtype = accumulation_dtype(a.dtype, b.dtype, self.weight.dtype)
        return torch.mm(b.to(dtype), a.to(dtype)).mul_(self.scaling)

    @torch.no_grad()
    def merged_weight(self, *, safe: bool = True) -> Tensor:
        """Return ``W + scaling * lora_B @ lora_A`` in W's dtype, rounded to it once.

        Args:
            safe: Refuse NaN and infinity.

        Raises:
            NonFiniteError: The base, a factor or the sum holds NaN or infinity.
            AdapterStateError: The layer is merged already.
        """
        if self.merged:
            raise AdapterStateError("the layer is merged already.", hint="Call unmerge() first.")
        parts = {name: getattr(self, name) for name in ("weight", "lora_A", "lora_B")}
        return add_update(self.weight, self.delta_weight(), parts, safe=safe)

    def merge(self, *, safe: bool = True, keep_base: bool = True) -> None:
        """Put the update into ``weight``, as a new Parameter.

        The old Parameter is never written to: tied weights and whoever else holds it stay as they
        are, and :meth:`unmerge` gives back the very same object, bit for bit.

        Args:
            safe: Refuse NaN and infinity, with nothing changed.
            keep_base: Keep the old Parameter for :meth:`unmerge`, at the price of its memory.

        Raises:
            NonFiniteError: See :meth:`merged_weight`.
            AdapterStateError: The layer is merged already.
        """
        self.adopt_merged(self.merged_weight(safe=safe), keep_base=keep_base)

    def adopt_merged(self, merged: Tensor, *, keep_base: bool) -> None:
        """Make ``merged``, a result of :meth:`merged_weight`, the layer's weight."""
        base = cast("nn.Parameter", self.weight)
        self.weight = nn.Parameter(merged, requires_grad=base.requires_grad)
        self._kept_weight = (base,) if keep_base else ()
        self.merged = True

    def unmerge(self) -> None:
        """Put the base's own Parameter back.

        Raises:
            AdapterStateError: The layer is not merged, or its base was not kept.
        """
        if not self.can_unmerge:
            state = "was merged with keep_base=False" if self.merged else "is not merged"
            raise AdapterStateError(f"the layer {state}, so it cannot be unmerged.")
        (self.weight,) = self._kept_weight
        self._kept_weight = ()
        self.merged = False

    @property
    def can_unmerge(self) -> bool:
        """Whether the layer is merged and its base was kept."""
        return self.merged and bool(self._kept_weight)

    @property
    def kept_weight(self) -> nn.Parameter | None:
        """The base's own Parameter while merged, if it was kept."""
        return self._kept_weight[0] if self._kept_weight else None

    def to_linear(self) -> nn.Linear:
        """Drop the adapter and be a plain ``nn.Linear`` with the weight of the moment."""
        del self.lora_A, self.lora_B
        for name in ("scaling", "dropout_p", "merged", "_kept_weight"):
            delattr(self, name)
        linear = cast("nn.Linear", self)
        linear.__class__ = nn.Linear
        return linear

    def extra_repr(self) -> str:
        """Say the sizes, the rank, the scaling and the dropout."""
        merged = ", merged" if self.merged else ""
        return (
            f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, "
            f"dropout={self.dropout_p:g}{merged}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Module.to() and its kin know of registered parameters only; the kept base moves along.
        if (base := self.kept_weight) is not None:
            with torch.no_grad():
                moved = fn(base)
            if moved.is_meta == base.is_meta:
                base.data = moved
            else:
                self._kept_weight = (nn.Parameter(moved, requires_grad=base.requires_grad),)
        return self

    # A state dict says in its metadata when a weight in it is a merged one, because loading that
    # into an adapted layer would count the update twice, without a word.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if self.merged and metadata is not None:
            metadata[prefix[:-1]]["merged"] = True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            which = "the layer" if self.merged else "the state dict"
            if self.merged or local_metadata.get("merged", False):
                error_msgs.append(
                    f"{which} at {prefix[:-1]!r} holds a merged weight; call gauge_ext.unmerge() "
                    "first, or the update would be lost or counted twice."
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
