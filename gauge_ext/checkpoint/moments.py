"""What is known of the inputs of a model's layers: second moments, and factors of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, GaugeError, GeometryError, NonFiniteError, TargetError
from gauge_ext.geometry.low_rank import input_factor


@torch.no_grad()
def input_moments(
    model: nn.Module, batches: Iterable[Any], modules: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Run a model and return C = E[x xᵀ] of the inputs of its linear layers.

    Every position of every batch counts once, padding too: give batches without it, or of one
    length. The model runs as it is; put it in evaluation mode first.

    Args:
        model: The model.
        batches: Inputs of it: tensors, tuples of positional or mappings of keyword arguments.
        modules: Paths of the layers; None for every ``nn.Linear``. Each costs in x in numbers.

    Returns:
        Path of the module -> ``(in, in)`` in float64, for the layers that were called.

    Raises:
        TargetError: A path names no ``nn.Linear``.
        ConfigError: No layer was called.
    """
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if unknown := [name for name in modules or () if name not in linear]:
        raise TargetError(f"{unknown[0]!r} is no nn.Linear of this {type(model).__name__}.")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums[name].add_(rows.mT @ rows) if name in sums else rows.mT @ rows
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return hook

    handles = [
        part.register_forward_pre_hook(watch(name))
        for name, part in linear.items()
        if modules is None or name in modules
    ]
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple):
                model(*batch)
            else:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ConfigError("no linear layer was called: there were no batches, or no such layer.")
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


class InputsError(GaugeError, ValueError):
    """What is given of a layer's inputs cannot be used."""


class LayerInputs:
    """The inputs of layers, whichever way they were given.

    Args:
        activations: Path of a module -> inputs of it, ``(*, in)``.
        covariances: Path of a module -> second moments of its inputs, ``(in, in)``.
        modules: The modules that inputs may be given for.

    Raises:
        InputsError: They are given twice for a module, or for another one.
    """

    def __init__(
        self,
        activations: Mapping[str, Tensor],
        covariances: Mapping[str, Tensor],
        modules: Collection[str],
    ) -> None:
        self.activations, self.covariances = activations, covariances
        if both := sorted(set(activations) & set(covariances)):
            raise InputsError(f"{both[0]!r} has activations and a covariance; give one of the two.")
        if unknown := sorted({*activations, *covariances} - set(modules)):
            raise InputsError(
                f"inputs are given for {len(unknown)} modules that are not extracted, such as "
                f"{unknown[0]!r}.",
                hint=f"Those that are have paths like {next(iter(modules))!r}.",
            )

    def factor(self, name: str, width: int) -> Tensor | None:
        """Return R of the inputs of a module, see :func:`input_factor`; None if none are given.

        Raises:
            InputsError: They have another shape, hold NaN, or are no second moments.
        """
        try:
            if name in self.activations:
                given = self.activations[name]
                if given.ndim < 1 or given.shape[-1] != width:
                    raise _wrong_shape(name, f"(*, {width})", given)
                return input_factor(activations=given)
            if name in self.covariances:
                given = self.covariances[name]
                if given.shape != (width, width):
                    raise _wrong_shape(name, f"({width}, {width})", given)
                return input_factor(covariance=given)
        except (GeometryError, NonFiniteError) as error:
            raise InputsError(f"{name!r}: {error.message}", hint=error.hint) from error
        return None


def _wrong_shape(name: str, expected: str, given: Tensor) -> InputsError:
    return InputsError(
        f"the inputs of {name!r} must have shape {expected}, got {tuple(given.shape)}."
    )
