"""Layers whose base and branches are computed apart and added."""

from __future__ import annotations

import torch
from torch import Tensor

from gauge_ext.adapters import branches
from gauge_ext.adapters.branches import Branch
from gauge_ext.adapters.layer import AdaptedLayer
from gauge_ext.adapters.rows import Rows, require_samples


class AdditiveLayer(AdaptedLayer):
    r"""A layer that says what its base gives, what one branch gives, and along which axis.

    .. math:: y = G \circ \mathrm{base}(x) + \sum_k s_k\,(B_k A_k \tilde x + \beta_k) + b

    with the inputs after dropout :math:`\tilde x`, the branches' biases :math:`\beta`
    (``lora_bias``) and DoRA's gain G.
    """

    @property
    def output_dim(self) -> int:
        """The axis of the output that runs over the outputs, from the end."""
        return -1

    def base_output(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """Return what the base computes, with b or without; each kind of layer defines it."""
        raise NotImplementedError(f"{type(self).__name__} defines no base_output()")

    def branch_output(self, x: Tensor, branch: Branch) -> Tensor:
        r"""Return :math:`B A \tilde x + \beta`, shaped as the output; each kind defines it."""
        raise NotImplementedError(f"{type(self).__name__} defines no branch_output()")

    def add_branch(self, y: Tensor, x: Tensor, branch: Branch) -> Tensor:
        r"""Return :math:`y + s\,(B A \tilde x + \beta)`, of y's dtype."""
        # torch.add(..., alpha=) is one pass less, but inductor of torch 2.13 loses an alpha beside
        # a product of matrices: compiled, the update would come without its scaling.
        return y + (self.branch_output(x, branch) * branch.scaling).to(y.dtype)

    def adapted_output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y for an unmerged layer, of the base's output's dtype.

        Raises:
            AdapterStateError: Each row has an adapter of its own, in training with dropout.
            ConfigError: It has, and x has another number of rows.
        """
        if self.rows is not None:
            return self._by_rows(x, bias, self.rows)
        working, gain = self.working()
        y = self.base_output(x, with_bias=gain is None)
        dtype = y.dtype
        if gain is not None:
            y = self._scaled(y, branches.along(gain, y, self.output_dim), bias)
        for branch in working:
            y = self.add_branch(y, x, branch)
        return y.to(dtype)

    def _scaled(self, y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """G ∘ base(x) + b, in the gain's dtype where that is wider."""
        return y * gain if bias is None else y * gain + branches.along(bias, y, self.output_dim)

    def _by_rows(self, x: Tensor, bias: Tensor | None, of_batch: Rows) -> Tensor:
        """The base once for all rows; each adapter's rows together; all added in one pass."""
        slots, index = branches.slots_of_rows(self, of_batch), of_batch.numbers
        require_samples(x, of_batch)
        gains = None
        if any(slot.has_magnitude for slot in slots):
            gains = branches.gains_of(self, slots)
        y = self.base_output(x, with_bias=gains is None)
        dtype = y.dtype
        if gains is not None:
            y = self._scaled(y, branches.of_rows(gains, index, y, self.output_dim), bias)
        updates, places = [], []
        for number, slot in enumerate(slots):
            rows = (index == number).nonzero().flatten().to(x.device)
            gain = gains[number + 1] if gains is not None and slot.has_magnitude else None
            branch = self.branch(slot, gain=gain)
            # The scale goes through the small factor, for a pass less over the outputs.
            shift = None if branch.bias is None else branch.bias * branch.scaling
            scaled = branch._replace(lora_B=branch.lora_B * branch.scaling, bias=shift)
            updates.append(self.branch_output(x[rows], scaled).to(y.dtype))
            places.append(rows)
        if updates:
            y = y.index_add(0, torch.cat(places), torch.cat(updates))
        return y.to(dtype)
