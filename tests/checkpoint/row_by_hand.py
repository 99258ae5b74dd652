"""A row of the comparison with PEFT: a model, both configs, and the result by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        name: What it is called in the table.
        make: The base model.
        inputs: What it is called with.
        fields: PEFT's LoraConfig.
        by_hand: Adds the adapter's tensors, keys without prefix, with scaling s to the weights.
        scaling: s.
        ours: Fields of our LoRAConfig that differ from PEFT's by more than their name.
        peft_is: What PEFT computes where that is not the sum by hand; "" where it is.
        dtype: Of the model; float32 where it is not made for more.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    fields: dict[str, Any]
    by_hand: Callable[[nn.Module, Tensors, float], None]
    scaling: float = 0.5
    ours: dict[str, Any] = field(default_factory=dict)
    peft_is: str = ""
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """Rounding of a few layers stays below this by far, a wrong formula above it."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5

    def base(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(0)
        model = self.make()
        return (model.double() if self.dtype == torch.float64 else model).eval()

    def expected(self, base: nn.Module, tensors: Tensors) -> nn.Module:
        """A copy of the base with the update by hand."""
        twin = copy.deepcopy(base)
        bare = {key.removeprefix(PREFIX): value.double() for key, value in tensors.items()}
        with torch.no_grad():
            self.by_hand(twin, bare, self.scaling)
        return twin

    def our_fields(self) -> dict[str, Any]:
        """PEFT's fields under our names."""
        names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        return {names.get(key, key): value for key, value in self.fields.items()} | self.ours


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The model's output, whatever it wraps it in."""
    with torch.no_grad():
        found = model(*inputs)
    if isinstance(found, tuple):
        return found[0]
    return found if isinstance(found, Tensor) else found[0]


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], tuple[Tensor]]:
    """Make inputs of a shape."""
    return lambda: (torch.randn(*shape, dtype=dtype, generator=_generator()),)


def tokens(vocab: int, *shape: int) -> Callable[[], tuple[Tensor]]:
    """Make token ids of a shape."""
    return lambda: (torch.randint(vocab, shape, generator=_generator()),)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


TWO = {"r": 4, "lora_alpha": 2}
