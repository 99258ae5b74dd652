"""Adapters as numpy arrays, read module by module: what merging into files needs, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.fields import check_supported, from_peft
from gauge_ext.checkpoint.folder import read_config, require_adapter
from gauge_ext.checkpoint.format import CONFIG_NAME, WEIGHTS_NAME, module_of
from gauge_ext.checkpoint.hashing import HashedFactor, hash_factors
from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, ConfigError, NonFiniteError
from gauge_ext.export.disk.numbers import BY_SAFETENSORS, Array
from gauge_ext.export.disk.safetensors_file import Stored, read_header
from gauge_ext.export.disk.spans import read
from gauge_ext.export.patching.update import LowRank

_KEYS = ("lora_A", "lora_B")
_LINEAR = {("linear", key) for key in _KEYS}


@dataclass(frozen=True)
class AdapterArrays:
    """An adapter on disk whose factors are read when asked for.

    Attributes:
        path: The folder.
        config: Its description.
        factors: Path of the module -> where lora_A ``(r, in)`` and lora_B ``(out, r)`` lie.
        weight: What the update is multiplied with, beside its scaling.
    """

    path: Path
    config: LoRAConfig
    factors: Mapping[str, tuple[Stored, Stored]]
    weight: float = 1.0

    def read(self, module: str) -> tuple[Array, Array]:
        """lora_A and lora_B of a module, in float32 or wider.

        Raises:
            NonFiniteError: one holds NaN or infinity.
        """
        arrays = []
        for key, stored in zip(_KEYS, self.factors[module], strict=True):
            number = BY_SAFETENSORS[stored.dtype]
            array = number.decode(np.frombuffer(bytearray(read(stored.span)), number.stored))
            if not np.isfinite(array).all():
                raise NonFiniteError(
                    f"{self.path / WEIGHTS_NAME}: {key} of {module!r} holds NaN or infinity."
                )
            arrays.append(array.reshape(stored.shape))
        return arrays[0], arrays[1]

    @cached_property
    def sha256(self) -> str:
        """The digest, see :func:`gauge_ext.checkpoint.adapter_digest`; it reads all factors.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        return hash_factors(
            (
                name,
                self.config.scaling_for(name),
                [
                    HashedFactor(array.shape, np.ascontiguousarray(array, "<f8"))
                    for array in self.read(name)
                ],
            )
            for name in sorted(self.factors)
        )


def open_adapter(path: str | Path, weight: float = 1.0) -> AdapterArrays:
    """Opens a LoRA adapter in PEFT's format and checks everything but the numbers.

    Args:
        path: The folder.
        weight: What the update is multiplied with, beside its scaling.

    Raises:
        AdapterFormatError: the folder or a file is missing, damaged, or no LoRA adapter.
        ConfigError: the config asks for mathematics that is not implemented, or ``weight`` is not
            finite.
    """
    folder = Path(path)
    if isinstance(weight, bool) or not np.isfinite(weight):
        raise ConfigError(f"the weight of {folder} must be a finite number, got {weight!r}.")
    require_adapter(folder)
    config_file, weights_file = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    raw = read_config(config_file)
    check_supported(raw, str(config_file))
    if raw.get("target_parameters"):
        raise ConfigError(
            f"{config_file}: target_parameters = {raw['target_parameters']!r} means bare "
            "parameters, and which of a module's an adapter is on only the model tells.",
            hint="Load the base and the adapter in torch, and merge there (gauge_ext.merge).",
        )
    factors = _pair_up(read_header(weights_file, AdapterFormatError), weights_file)
    config = from_peft(raw, str(config_file), list(factors))
    _require_plain(raw, config_file)
    for name, (a, b) in factors.items():
        if a.shape[0] != config.rank_for(name):
            raise AdapterFormatError(
                f"{folder}: the rank of {name!r} is {config.rank_for(name)} by {CONFIG_NAME} (r, "
                f"rank_pattern), but its weights have lora_A {a.shape} and lora_B {b.shape}."
            )
    return AdapterArrays(folder, config, factors, float(weight))


def _require_plain(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse what would be left out in silence: all but the product of two factors."""
    fields = ("use_dora", "lora_bias", "modules_to_save", "target_parameters")
    asked = [name for name in (*fields, "trainable_token_indices") if raw.get(name)]
    if raw.get("bias") not in (None, "none"):
        asked.append("bias")
    if asked:
        raise ConfigError(
            f"{file}: {asked[0]} = {raw[asked[0]]!r} asks for more than the product of two "
            "factors, which is all that can be merged into files.",
            hint="Load the base and the adapter in torch, merge there (gauge_ext.merge), and "
            "export that.",
        )


def _pair_up(tensors: Mapping[str, Stored], file: Path) -> dict[str, tuple[Stored, Stored]]:
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in tensors.items():
        if key.endswith(".base_layer.weight"):
            continue  # the table of an adapted embedding or head, the base's own, saved along
        parts = module_of(key)
        if parts is None or parts[1:] not in _LINEAR or len(stored.shape) != 2:
            raise AdapterFormatError(
                f"{file} holds {key!r} of shape {stored.shape}, which is no plain LoRA factor on a "
                "linear layer.",
                hint="Load the base and the adapter in torch, merge there (gauge_ext.merge), and "
                "export that.",
            )
        module, _, name = parts
        if found.setdefault(module, {}).setdefault(name, stored) is not stored:
            raise AdapterFormatError(f"{file} holds {name} of {module!r} twice.")
    if not found:
        raise AdapterFormatError(f"{file} holds no tensors, so it is no adapter.")
    return {module: _pair(module, pair, file) for module, pair in sorted(found.items())}


def _pair(module: str, pair: dict[str, Stored], file: Path) -> tuple[Stored, Stored]:
    if missing := [key for key in _KEYS if key not in pair]:
        raise AdapterFormatError(f"{file} holds no {missing[0]} of {module!r}.")
    a, b = pair["lora_A"], pair["lora_B"]
    if a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise AdapterFormatError(
            f"{file}: the factors of {module!r} do not fit each other, got lora_A {a.shape} and "
            f"lora_B {b.shape}."
        )
    if a.dtype != b.dtype or a.dtype not in BY_SAFETENSORS:
        raise AdapterFormatError(
            f"{file}: the factors of {module!r} must be of one floating-point dtype, got {a.dtype} "
            f"and {b.dtype}."
        )
    return a, b


@dataclass(frozen=True)
class Updates:
    """What one or several adapters add, by module.

    Attributes:
        adapters: The adapters.
        shapes: Path of the module -> ``(out, in)`` of its weight.
    """

    adapters: tuple[AdapterArrays, ...]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def transposes(self) -> bool:
        """Whether an adapter says that base weights may lie ``(in, out)`` (``fan_in_fan_out``)."""
        return any(adapter.config.fan_in_fan_out for adapter in self.adapters)

    def of(self, module: str) -> LowRank:
        """The update of a weight ``(out, in)``: the sum of weight · s · B A.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        lefts, rights = [], []
        for adapter in self.adapters:
            if module in adapter.factors:
                lora_A, lora_B = adapter.read(module)
                scaling = adapter.weight * adapter.config.scaling_for(module)
                lefts.append(lora_B.astype("<f8") * scaling)
                rights.append(lora_A)
        return LowRank(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))

    def describe(self, module: str) -> dict[str, Any]:
        """Rank and scaling of a module's update, in lists where several adapters share it."""
        having = [adapter for adapter in self.adapters if module in adapter.factors]
        ranks = [adapter.config.rank_for(module) for adapter in having]
        scalings = [adapter.weight * adapter.config.scaling_for(module) for adapter in having]
        if len(having) == 1:
            return {"rank": ranks[0], "scaling": scalings[0]}
        return {"rank": ranks, "scaling": scalings}

    def check_numbers(self) -> None:
        """Reads everything once.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        for adapter in self.adapters:
            _ = adapter.sha256


AdapterSource = str | Path | Sequence[tuple[str | Path, float]] | Mapping[str | Path, float]


def open_updates(source: AdapterSource) -> Updates:
    """Opens one adapter, or several with weights.

    Args:
        source: A folder, or folders with the weight of each: pairs or a mapping.

    Raises:
        AdapterFormatError: see :func:`open_adapter`.
        AdapterMismatchError: two adapters are for weights of different shapes.
        ConfigError: see :func:`open_adapter`; or there are none.
    """
    pairs: Iterable[tuple[str | Path, float]]
    if isinstance(source, str | Path):
        pairs = [(source, 1.0)]
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
    adapters = tuple(open_adapter(path, weight) for path, weight in pairs)
    if not adapters:
        raise ConfigError("adapter names no folder.", hint="Give at least one adapter.")
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for module, (a, b) in adapter.factors.items():
            shape = (b.shape[0], a.shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise AdapterMismatchError(
                    f"{adapter.path} has {module!r} for a weight of shape {shape}, another adapter "
                    f"for one of shape {shapes[module]}."
                )
    return Updates(adapters, dict(sorted(shapes.items())))
