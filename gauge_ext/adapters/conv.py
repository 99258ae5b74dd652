"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with a low-rank adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_ext.adapters.additive import AdditiveLayer
from gauge_ext.adapters.branches import Branch
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.spec import AdapterSpec

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


class LoRAConv(AdditiveLayer):
    r"""A convolution with a LoRA adapter: one to r channels with its kernel, and one back.

    .. math:: y = W * x + b + s\,B * (A * x)

    ``lora_A`` (r, in, *kernel) is applied with the stride, padding, padding mode and dilation of
    the base, ``lora_B`` (out, r / groups, 1, ...) at single places. Without groups the update of W
    is s B A with both factors as matrices, (out, r) and (r, in * kernel).

    With groups, PEFT's format lets A see all channels and groups B alone, so the update joins
    channels that the base keeps apart. Merged, such a layer is therefore one with ``groups`` = 1
    and a weight (out, in, *kernel), which has zeros where only the base would reach; unmerged it is
    grouped again.
    """

    bases = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    weight: Tensor
    bias: Tensor | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    groups: int
    _reversed_padding_repeated_twice: list[int]

    @classmethod
    def factor_shapes(cls, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``(rank, in, *kernel)`` and ``(out, rank / groups, 1, ...)``."""
        ones = (1,) * len(module.kernel_size)
        groups = _groups(module)
        return (rank, module.in_channels, *module.kernel_size), (
            module.out_channels,
            rank // groups,
            *ones,
        )

    @classmethod
    def reason_against_spec(cls, module: nn.Module, spec: AdapterSpec) -> str | None:
        """Say why the adapter cannot be as ``spec`` says, or return None where it can."""
        groups = cast("int", module.groups)
        if spec.rank % groups:
            return f"its {groups} groups need a rank that is a multiple of that, got {spec.rank}"
        if groups > 1 and spec.use_dora:
            return "DoRA has no meaning for a grouped convolution, whose update is not grouped"
        return super().reason_against_spec(module, spec)

    def product(self, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """Return ``B A``, ``(out, in, *kernel)``."""
        groups, a = _groups(self), lora_A.flatten(1)
        b = lora_B.reshape(groups, self.out_channels // groups, -1)
        flat = torch.bmm(b, a.reshape(groups, -1, a.shape[1]))
        return flat.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def magnitude_shape(self) -> tuple[int, ...]:
        """Return ``(1, out, 1, ...)``."""
        return (1, self.out_channels) + (1,) * len(self.kernel_size)

    @property
    def blocks(self) -> int:
        """The groups: those of the outputs share lora_B's columns, and have rows of lora_A each."""
        return _groups(self)

    @property
    def output_dim(self) -> int:
        """The axis of the channels, from the end."""
        return -1 - len(self.kernel_size)

    def matrices(self, slot: AdapterSlot) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight (out, in * kernel), and A and B of an adapter."""
        return self.weight.flatten(1), slot.lora_A.flatten(1), slot.lora_B.flatten(1)

    def mergeable_weight(self) -> Tensor:
        """Return the weight ``(out, in, *kernel)``, with zeros between the groups."""
        weight, groups = self.weight, self.groups
        if groups == 1:
            return weight
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        dense = weight.new_zeros(groups, grouped.shape[1], groups, *weight.shape[1:])
        for group in range(groups):
            dense[group, :, group] = grouped[group]
        return dense.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def adopt_merged(self, merged: Mapping[str, Tensor], *, keep_base: bool) -> None:
        """Make ``merged``, a result of :meth:`merged_parameters`, the layer's own."""
        super().adopt_merged(merged, keep_base=keep_base)
        if self.groups > 1:
            self._grouped, self.groups = self.groups, 1

    def unmerge(self) -> None:
        """Put the base's own Parameters and groups back, see the base class."""
        super().unmerge()
        self.groups = vars(self).pop("_grouped", self.groups)

    def to_base(self) -> nn.Module:
        """Drop the adapter and be a plain layer again, with the weight of the moment."""
        vars(self).pop("_grouped", None)
        return super().to_base()

    def forward(self, input: Tensor) -> Tensor:
        """Return the adapted layer's output.

        Args:
            input: x, ``(batch, in, *size)`` or ``(in, *size)``.

        Returns:
            ``(batch, out, *size)`` or ``(out, *size)``.
        """
        if not self.has_branch:
            return self._convolve(input, self.weight, self.bias, self.groups)
        return self.adapted_output(input, self.bias)

    def base_output(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """Return the base's convolution."""
        return self._convolve(x, self.weight, self.bias if with_bias else None, self.groups)

    def branch_output(self, x: Tensor, branch: Branch) -> Tensor:
        """Return what the r channels give, ``(batch, out, *size)``."""
        return self._expand(self._hidden(x, branch), branch)

    def add_branch(self, y: Tensor, x: Tensor, branch: Branch) -> Tensor:
        r"""Return :math:`y + s\,(B A \tilde x + \beta)`, of y's dtype and memory format.

        Where every output sees the r channels, the product and the sum are one pass over y.
        """
        hidden = self._hidden(x, branch)
        batched = y.dim() == len(self.kernel_size) + 2
        if self.groups > 1 or branch.bias is not None or hidden.dtype != y.dtype or not batched:
            return y + (self._expand(hidden, branch) * branch.scaling).to(y.dtype)
        lora_B, s = branch.lora_B.flatten(1), branch.scaling
        if y.is_contiguous():
            factors = lora_B.expand(len(y), -1, -1), hidden.flatten(2)
            return torch.baddbmm(y.flatten(2), *factors, alpha=s).view_as(y)
        rows, hidden = y.movedim(1, -1), hidden.movedim(1, -1)  # channels_last, as torch has it
        flat = torch.addmm(rows.flatten(0, -2), hidden.flatten(0, -2), lora_B.mT, alpha=s)
        return flat.view(rows.shape).movedim(-1, 1)

    def _hidden(self, x: Tensor, branch: Branch) -> Tensor:
        """The r channels, ``(batch, r, *size)``, in the factors' dtype."""
        dropped = F.dropout(x, branch.dropout_p) if branch.dropout_p > 0.0 else x
        return self._convolve(dropped.to(branch.lora_A.dtype), branch.lora_A, None, 1)

    def _expand(self, hidden: Tensor, branch: Branch) -> Tensor:
        convolution = _CONVOLUTIONS[len(self.kernel_size) - 1]
        return convolution(hidden, branch.lora_B, branch.bias, groups=self.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        convolution = _CONVOLUTIONS[len(self.kernel_size) - 1]
        return convolution(x, weight, bias, self.stride, padding, self.dilation, groups)


def _groups(module: Any) -> int:
    """The groups of the base, which a merged layer has no more."""
    return int(vars(module).get("_grouped", module.groups))
