"""Which parameters of a model are the two factors of one update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError


class FactorPair(NamedTuple):
    """The two factors of an update ``scaling * B A``.

    Attributes:
        lora_A: ``(r, in)``, or of a convolution ``(r, in, *kernel)``.
        lora_B: ``(out, r)``, or of a convolution ``(out, r, 1, ...)``.
        scaling: s, not 0.
        name: Where the pair is in its model; for messages.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    name: str = ""


def factor_pairs(model: nn.Module) -> list[FactorPair]:
    """Find the factor pairs of a model that are to be trained, each once.

    A pair is what one module has under the names ``lora_A`` and ``lora_B`` beside a ``scaling``, or
    under the names of PEFT's layers. Pairs of which a factor is frozen are left out: without the
    freedom to change both there is no gauge to be independent of.

    Args:
        model: A model with adapters of this package or of PEFT.

    Raises:
        ConfigError: A factor belongs to two pairs, or its scaling is 0 or not finite.
    """
    pairs: list[FactorPair] = []
    owner: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=True):
        for name, a, b, scaling in _of_module(path, module):
            if not (a.requires_grad and b.requires_grad):
                continue
            for factor in (a, b):
                if id(factor) in owner:
                    raise ConfigError(
                        f"{name!r} shares a factor with {owner[id(factor)]!r}, and a factor of two "
                        "updates has no gauge of its own.",
                        hint="Train shared factors with AdamW.",
                    )
                owner[id(factor)] = name
            pairs.append(checked(FactorPair(a, b, scaling, name)))
    return pairs


def checked(pair: FactorPair) -> FactorPair:
    """Refuse a pair that is none.

    Raises:
        ConfigError: The shapes do not fit, or the scaling is 0 or not finite.
    """
    a, b = pair.lora_A, pair.lora_B
    fits = a.ndim >= 2 and b.ndim >= 2 and b.numel() == b.shape[0] * a.shape[0]
    if not fits or a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"the factors of a pair must have shapes (r, in, ...) and (out, r), got "
            f"{tuple(a.shape)} and {tuple(b.shape)}{_at(pair)}."
        )
    if not math.isfinite(pair.scaling) or pair.scaling == 0:
        raise ConfigError(
            f"the scaling of a pair must be finite and not 0, got {pair.scaling}{_at(pair)}."
        )
    return pair


def _at(pair: FactorPair) -> str:
    return f" at {pair.name!r}" if pair.name else ""


def _of_module(
    path: str, module: nn.Module
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, float]]:
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    scaling: Any = getattr(module, "scaling", None)
    if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and scaling is not None:
        yield path, a, b, float(scaling)
    elif isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict) and scaling is not None:
        for key, part in a.items():  # PEFT: a module for each factor of each adapter
            yield f"{path}.{key}", _weight(part), _weight(b[key]), float(scaling[key])
    a, b = (getattr(module, f"lora_embedding_{factor}", None) for factor in "AB")
    if isinstance(a, nn.ParameterDict) and isinstance(b, nn.ParameterDict):
        for key in a:
            yield f"{path}.{key}", a[key], b[key], float(scaling[key])


def _weight(module: nn.Module) -> nn.Parameter:
    return cast("nn.Parameter", module.weight)


class Matrix:
    """A factor as a matrix that shares its memory, and its gradient likewise.

    The entries beyond the first dimension are columns, in the order in which they lie in memory:
    any order does, as long as the gradient has the same, since no step mixes columns of A.

    Args:
        factor: A parameter of two or more dimensions.
    """

    def __init__(self, factor: Tensor) -> None:
        data = factor.detach()
        strides = data.stride()
        order = sorted(range(1, data.ndim), key=lambda d: (-strides[d], d))
        self._order = (0, *order)
        self._rows = data.shape[0]
        lying = data.permute(self._order)
        self.shares = lying.is_contiguous()
        self.value = lying.contiguous().view(self._rows, -1)
        self._lying = lying

    def like(self, gradient: Tensor) -> Tensor:
        """Return the gradient as a contiguous matrix with the same columns."""
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the factor optimizers need dense gradients, got one of layout {gradient.layout}; "
                "make the embedding with sparse=False."
            )
        return gradient.permute(self._order).contiguous().view(self._rows, -1)

    def write_back(self) -> None:
        """Copy the matrix into a factor that it could not share memory with."""
        if not self.shares:
            self._lying.copy_(self.value.view(self._lying.shape))
