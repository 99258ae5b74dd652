"""One small layer of each kind that can carry an adapter, and its mathematics by hand.

The oracle of a case is its base layer run with the weight ``W + s·(B·A)``, where B·A is a sum
written down anew here for the kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gauge_ext.adapters import AdaptedLayer, AdapterSpec, adapt


@dataclass(frozen=True)
class LayerCase:
    """A layer, inputs for it, and the product of two factors in its weight's layout."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    weight_name: str = "weight"

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
        twin = copy.deepcopy(base).double()
        delta = self.product(layer.lora_B.detach().double(), layer.lora_A.detach().double())
        with torch.no_grad():
            twin.get_parameter(self.weight_name).add_(layer.scaling * delta)
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
    ),
]
