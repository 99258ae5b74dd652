"""What the adapters with two factors beside a held base have in common."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext import ops
from gauge_ext.adapters.merging import accumulation_dtype, adapter_dtype
from gauge_ext.adapters.protocol import Kind
from gauge_ext.adapters.wrapped import WrappedAdapter, is_plain
from gauge_ext.errors import ConfigError
from gauge_ext.geometry.gauge import Gauged, GaugeName, to_gauge
from gauge_ext.geometry.point import LoRAPoint


class LowRankAdapter(WrappedAdapter):
    r"""A frozen base with a low-rank update beside it: :math:`\Delta W = s\,B A`.

    Over a plain ``nn.Linear`` the whole layer is one compiled op. A subclass says what
    :attr:`lora_A` and :attr:`lora_B` are and how :meth:`assign` sets them.

    Args:
        base_model: The base.
        rank: r, at least 1.
        scaling: s, not zero.

    Raises:
        TargetError: See :class:`WrappedAdapter`.
        ConfigError: The rank or the scaling cannot be used.
    """

    kind: ClassVar[Kind] = "linear"
    scaling: float

    def __init__(self, base_model: nn.Module, rank: int, scaling: float) -> None:
        super().__init__(base_model)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"the rank must be a whole number of at least 1, got {rank!r}.")
        if not math.isfinite(scaling) or scaling == 0.0:
            raise ConfigError(f"scaling must be a finite number other than 0, got {scaling}.")
        self.scaling = float(scaling)

    @property
    def lora_A(self) -> Tensor:
        """A, ``(r, in)``."""
        raise NotImplementedError

    @property
    def lora_B(self) -> Tensor:
        """B, ``(out, r)``, without the scaling."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """r, the inner size of the two factors."""
        return self.lora_A.shape[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what training changes, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("base_model.")
        }

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return lora_A and lora_B, which is what a file holds."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def assign(self, point: LoRAPoint) -> None:
        """Make ``(s B, A) = (point.B, point.A)``, in the dtype of the factors.

        Parameters whose shape stays are written in place, so an optimizer goes on knowing them; its
        moments are those of the old factors all the same.
        """
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            input: x, ``(*batch, in)``.

        Returns:
            ``(*batch, out)``, of x's dtype.
        """
        base = self.base_model
        if not is_plain(base):
            return super().forward(input)
        return ops.lora_linear(
            input, base.weight, base.bias, self.lora_A, self.lora_B, self.scaling
        )

    def update(self, x: Tensor) -> Tensor:
        """Return ``s x Aᵀ Bᵀ``, ``(*batch, out)``, differentiably."""
        lora_A = self.lora_A
        return self.scaling * F.linear(F.linear(x.to(lora_A.dtype), lora_A), self.lora_B)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update ``s B A``, ``(out, in)``, in float32, or float64 if a part is."""
        a, b = self.lora_A, self.lora_B
        dtype = accumulation_dtype(a.dtype, b.dtype, self._like().dtype)
        return torch.mm(b.to(dtype), a.to(dtype)).mul_(self.scaling)

    def point(self) -> LoRAPoint:
        """Return where the factors are in the bundle: ``(s B, A)``, detached copies."""
        return LoRAPoint.from_layer(self)

    def gauge_fix(self, name: GaugeName = "svd") -> Gauged:
        """Change the factors to a canonical gauge; what the module computes stays the same.

        Args:
            name: See :func:`~gauge_ext.geometry.gauge.to_gauge`.

        Returns:
            The point that the factors were set to and the G that took them there.

        Raises:
            ConfigError: There is no such gauge.
            NonFiniteError: A factor holds NaN or infinity.
        """
        gauged = to_gauge(self.point(), name)
        self.assign(gauged.point)
        return gauged

    def filled(self, point: LoRAPoint) -> LoRAPoint:
        """Raise a pair of lower rank to this module's rank by fresh directions with B zero.

        Where both factors were zero, no gradient would ever reach them.
        """
        missing = self.rank - point.rank
        if missing <= 0:
            return point
        a, b = self._new_factors(missing)
        return LoRAPoint(
            torch.cat([point.B, b.to(point.B)], 1), torch.cat([point.A, a.to(point.A)])
        )

    def _new_factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Fresh factors: A uniform in ±1/sqrt(in), B zero, so that nothing changes at first."""
        like = self._like()
        dtype = adapter_dtype(like.dtype)
        a = torch.empty(rank, self.in_features, dtype=dtype, device=like.device)
        nn.init.uniform_(a, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        return a, torch.zeros(self.out_features, rank, dtype=dtype, device=like.device)


def set_parameter(holder: nn.Module, name: str, value: Tensor) -> None:
    """Set ``holder``'s parameter, in place where its shape stays and as a new one where not."""
    old = holder.get_parameter(name)
    with torch.no_grad():
        if old.shape == value.shape:
            old.copy_(value)
        else:
            new = nn.Parameter(value.to(old.device, old.dtype, copy=True), old.requires_grad)
            setattr(holder, name, new)
