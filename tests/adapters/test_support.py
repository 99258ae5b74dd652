"""Which layers can carry an adapter, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gauge_ext.adapters import LoRALinear, unsupported_reason


class Subclass(nn.Linear):
    """Computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def reparametrised() -> nn.Linear:
    layer = nn.Linear(3, 2)
    nn.utils.parametrizations.weight_norm(layer)
    return layer


def pruned() -> nn.Linear:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=1)


def integer() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_linear_layers_are_supported(dtype: torch.dtype, bias: bool) -> None:
    assert unsupported_reason(nn.Linear(3, 2, bias, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            nn.ConvTranspose1d(2, 2, 1),
            "it is a torch.nn.modules.conv.ConvTranspose1d, and supported",
        ),
        (nn.Embedding(3, 2, max_norm=1.0), "its max_norm rewrites the frozen table"),
        (nn.MultiheadAttention(4, 2, vdim=3), "its key or value has another size"),
        (nn.MultiheadAttention(4, 2).out_proj, "nn.MultiheadAttention reads the weight"),
        (Subclass(3, 2), "Subclass is a subclass of nn.Linear"),
        (nn.LazyLinear(3), "LazyLinear is a subclass of nn.Linear"),
        (LoRALinear(3, 2), "it has an adapter already"),
        (replaced_forward(), "its forward was replaced"),
        (reparametrised(), "subclass of nn.Linear"),  # parametrize makes a class of its own
        (pruned(), "its weight is not a plain parameter"),
        (integer(), "its weight is torch.int8"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_others_are_refused_with_the_reason(module: nn.Module, words: str) -> None:
    reason = unsupported_reason(module)
    assert reason is not None
    assert words in reason
