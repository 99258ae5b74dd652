"""One small layer of each kind that can carry an adapter, and its mathematics by hand.

The oracle of a case is its base layer run with the weight ``W + s·(B·A)``, where B·A is a sum
written down anew here for the kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import AdaptedLayer, AdapterSpec, adapt
from gauge_ext.adapters.slot import AdapterSlot


@dataclass(frozen=True)
class LayerCase:
    """A layer, inputs for it, and the product of two factors in its weight's layout."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    weight_name: str = "weight"
    axis: int = 0  # of the outputs, in the weight
    without: tuple[str, ...] = ()  # what this layer cannot have

    def adapted(
        self, dtype: torch.dtype = torch.float64, **spec: object
    ) -> tuple[nn.Module, AdaptedLayer]:
        """Return a copy of the base and the base with an adapter of random factors."""
        base = self.make().to(dtype)
        layer = adapt(copy.deepcopy(base), AdapterSpec(**{"rank": 4, "scaling": 0.7} | spec))
        randomize(layer)
        return base, layer

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return inputs, in ``dtype`` where they are numbers and not indices."""
        x = self.inputs()
        return x.to(dtype) if x.is_floating_point() else x

    def expected(self, base: nn.Module, layer: AdaptedLayer) -> nn.Module:
        """Return the base with ``W + s·B·A``, summed in float64."""
        return self.expected_sum(base, [(layer, 1.0)])

    def expected_sum(
        self, base: nn.Module, slots: Sequence[tuple[AdapterSlot, float]]
    ) -> nn.Module:
        """Return the base with every adapter's change of its weight and bias, times a number."""
        twin = copy.deepcopy(base).double()
        own = twin.get_parameter(self.weight_name).detach()
        if getattr(twin, "groups", 1) > 1:  # the same convolution with zeros written out
            own = _without_groups(twin)
        weight, shift = own.clone(), torch.zeros(own.shape[self.axis], dtype=torch.float64)
        shape = [-1 if axis == self.axis else 1 for axis in range(own.dim())]
        others = [axis for axis in range(own.dim()) if axis != self.axis]
        for slot, number in slots:
            delta = self.product(slot.lora_B.detach().double(), slot.lora_A.detach().double())
            alone, gain = own + slot.scaling * delta, torch.ones_like(shift)
            if "lora_magnitude" in slot.trained():
                lengths = alone.square().sum(others).sqrt()
                gain = slot.lora_magnitude.detach().double().flatten() / lengths
                alone = alone * gain.view(shape)
            if "lora_bias" in slot.trained():
                shift += number * gain * slot.scaling * slot.lora_bias.detach().double()
            weight += number * (alone - own)
        setattr(twin, self.weight_name, nn.Parameter(weight))
        if bool(shift.any()):
            twin.bias = nn.Parameter(shift if twin.bias is None else twin.bias + shift)
        return twin


def randomize(layer: nn.Module) -> None:
    """Fill the adapter's parameters with values that matter."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_(std=0.5)


def _matrix(b: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("or,ri->oi", b, a)


def _conv1d_of_transformers() -> nn.Module:
    module = pytest.importorskip("transformers.pytorch_utils")
    layer = module.Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


def _without_groups(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()
    groups, layer.groups = layer.groups, 1
    rows = weight.shape[0] // groups
    dense = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
    for out in range(weight.shape[0]):
        first = out // rows * weight.shape[1]
        dense[out, first : first + weight.shape[1]] = weight[out]
    return dense


def _conv(b: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("or,ri...->oi...", b.flatten(1), a)


def _grouped_conv(b: Tensor, a: Tensor) -> Tensor:
    """Two groups, of which each sees half of the r channels."""
    out, rank = b.shape[0] // 2, a.shape[0] // 2
    return torch.cat([_conv(b[:out], a[:rank]), _conv(b[out:], a[rank:])])


CASES = [
    LayerCase("linear", lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6), _matrix),
    LayerCase(
        "linear without bias", lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(6), _matrix
    ),
    LayerCase(
        "Conv1D",
        _conv1d_of_transformers,
        lambda: torch.randn(2, 3, 6),
        lambda b, a: torch.einsum("or,ri->io", b, a),
        axis=1,
    ),
    LayerCase(
        "embedding",
        lambda: nn.Embedding(7, 5, padding_idx=0),
        lambda: torch.tensor([[1, 2, 6], [2, 3, 1]]),
        lambda b, a: torch.einsum("dr,rv->vd", b, a),
        axis=1,
        without=("lora_bias",),
    ),
    LayerCase(
        "conv1d, strided",
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False),
        lambda: torch.randn(2, 4, 9),
        _conv,
    ),
    LayerCase("conv1d, one place", lambda: nn.Conv1d(4, 6, 1), lambda: torch.randn(4, 5), _conv),
    LayerCase(
        "conv2d, dilated and circular",
        lambda: nn.Conv2d(3, 4, (3, 2), padding=2, dilation=(2, 1), padding_mode="circular"),
        lambda: torch.randn(1, 3, 4, 3),
        _conv,
    ),
    LayerCase(
        "conv2d, same and reflected",
        lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
        lambda: torch.randn(1, 3, 4, 4),
        _conv,
    ),
    LayerCase(
        "conv2d, two groups",
        lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2),
        lambda: torch.randn(1, 4, 3, 4),
        _grouped_conv,
        without=("use_dora",),
    ),
    LayerCase(
        "conv3d", lambda: nn.Conv3d(2, 3, 2, padding=1), lambda: torch.randn(1, 2, 3, 3, 3), _conv
    ),
]
