"""What one or several adapters change of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.export.patching.adapter_arrays import AdapterArrays, open_adapter
from gauge_ext.export.patching.update import LowRank, WeightShape

AdapterSource = str | Path | Sequence[tuple[str | Path, float]] | Mapping[str | Path, float]


@dataclass(frozen=True)
class Updates:
    """What one or several adapters change, by module.

    Attributes:
        adapters: The adapters.
        weights: Path of the module -> its weight.
    """

    adapters: tuple[AdapterArrays, ...]
    weights: Mapping[str, WeightShape]

    @property
    def transposes(self) -> bool:
        """Whether an adapter says that base weights may lie ``(in, out)`` (``fan_in_fan_out``)."""
        return any(adapter.config.fan_in_fan_out for adapter in self.adapters)

    @cached_property
    def biases(self) -> tuple[str, ...]:
        """The modules whose bias changes (``lora_bias``)."""
        return tuple(
            module
            for module in self.weights
            if any("lora_bias" in adapter.modules[module].tensors for adapter in self._on(module))
        )

    @cached_property
    def tied(self) -> dict[str, str]:
        """Path of each layer that gets an embedding's update by every adapter -> the embedding's.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        said = {pair for adapter in self.adapters for pair in adapter.tied.items()}
        return {
            module: table
            for module, table in said
            if all(a.tied.get(module) == table for a in (*self._on(module), *self._on(table)))
        }

    def _on(self, module: str) -> list[AdapterArrays]:
        return [adapter for adapter in self.adapters if module in adapter.modules]

    def of(self, module: str) -> LowRank:
        """The update of a weight ``(out, in)``: the sum of weight · s · B A, and DoRA's lengths.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity.
        """
        lefts, rights, magnitude = [], [], None
        for adapter in self._on(module):
            tensors = adapter.read(module)
            lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
            rank = len(lora_A)
            lefts.append(lora_B.reshape(-1, rank).astype("<f8") * adapter.scaling(module))
            rights.append(lora_A.reshape(rank, -1))
            if "lora_magnitude" in tensors:
                magnitude = tensors["lora_magnitude"].astype("<f8").reshape(-1)
        return LowRank(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0), magnitude)

    def of_bias(self, module: str) -> LowRank:
        """The update of a bias, as a matrix of one row: the sum of weight · s · lora_bias.

        Raises:
            NonFiniteError: a tensor holds NaN or infinity.
        """
        having = [a for a in self._on(module) if "lora_bias" in a.modules[module].tensors]
        scalings = [[adapter.scaling(module) for adapter in having]]
        rows = [adapter.read(module)["lora_bias"].reshape(-1) for adapter in having]
        return LowRank(np.array(scalings), np.stack(rows))

    def describe(self, module: str) -> dict[str, Any]:
        """Rank and scaling of a module's update, in lists where several adapters share it."""
        having = self._on(module)
        ranks = [adapter.config.rank_for(module) for adapter in having]
        scalings = [adapter.scaling(module) for adapter in having]
        if len(having) > 1:
            return {"rank": ranks, "scaling": scalings}
        said = {"rank": ranks[0], "scaling": scalings[0]}
        if "lora_magnitude" in having[0].modules[module].tensors:
            said["use_dora"] = True
        return said

    def check_numbers(self) -> None:
        """Reads everything once.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        for adapter in self.adapters:
            _ = adapter.sha256


def open_updates(source: AdapterSource) -> Updates:
    """Opens one adapter, or several with weights.

    Args:
        source: A folder, or folders with the weight of each: pairs or a mapping.

    Raises:
        AdapterFormatError: see :func:`open_adapter`.
        AdapterMismatchError: two adapters are for weights of different shapes.
        ConfigError: see :func:`open_adapter`; or there are none; or DoRA would have to set the
            lengths of a sum with another adapter's update.
    """
    pairs: Iterable[tuple[str | Path, float]]
    if isinstance(source, str | Path):
        pairs = [(source, 1.0)]
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
    adapters = tuple(open_adapter(path, weight) for path, weight in pairs)
    if not adapters:
        raise ConfigError("adapter names no folder.", hint="Give at least one adapter.")
    weights: dict[str, WeightShape] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            if weights.setdefault(name, module.weight) != module.weight:
                raise AdapterMismatchError(
                    f"{adapter.path} has {name!r} for a {module.weight.kind} weight of shape "
                    f"{module.weight.matrix}, another adapter for a {weights[name].kind} weight of "
                    f"shape {weights[name].matrix}."
                )
    found = Updates(adapters, dict(sorted(weights.items())))
    for name in found.weights:
        having = [adapter for adapter in adapters if name in adapter.modules]
        if len(having) > 1 and any(a.config.use_dora for a in having):
            raise ConfigError(
                f"{len(having)} adapters change {name!r}, one of them with DoRA, which sets the "
                "length of the whole: their sum would depend on which goes first.",
                hint="Merge one, and then the other into the result.",
            )
    return found
