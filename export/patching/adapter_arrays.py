"""Adapters as numpy arrays, read module by module: what merging into files needs, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gauge_ext.adapters import LoRAConfig
from gauge_ext.checkpoint.fields import check_supported, from_peft
from gauge_ext.checkpoint.folder import read_config, require_adapter
from gauge_ext.checkpoint.format import (
    CONFIG_NAME,
    OLD_MAGNITUDE,
    WEIGHTS_NAME,
    WRAPPED,
    module_of,
)
from gauge_ext.checkpoint.hashing import HashedFactor, hash_factors
from gauge_ext.errors import AdapterFormatError, ConfigError, NonFiniteError
from gauge_ext.export.disk.numbers import BY_SAFETENSORS, Array
from gauge_ext.export.disk.safetensors_file import Stored, read_header
from gauge_ext.export.disk.spans import read
from gauge_ext.export.patching.update import WeightShape

if TYPE_CHECKING:
    from gauge_ext.adapters import Kind

_IN_TORCH = (
    "Load the base and the adapter in torch, merge there (gauge_ext.merge), and export that."
)
_FACTORS = ("lora_A", "lora_B")
_TENSORS = (*_FACTORS, "lora_magnitude", "lora_bias")  # in the order in which they are hashed


@dataclass(frozen=True)
class ModuleArrays:
    """Where the tensors of one module's adapter lie.

    Attributes:
        kind: How they are laid out and named, see :class:`~gauge_ext.adapters.Adapter`.
        tensors: By name: lora_A ``(r, in)`` or ``(r, in, *kernel)``, lora_B ``(out, r)`` or
            ``(out, r, 1, ...)``; lora_magnitude and lora_bias, of ``out`` numbers, where there are.
    """

    kind: Kind
    tensors: Mapping[str, Stored]

    @property
    def weight(self) -> WeightShape:
        """The weight that it is for."""
        a, b = (self.tensors[name].shape for name in _FACTORS)
        if self.kind == "embedding":
            return WeightShape((b[0], a[1]), "embedding")
        if len(a) > 2:
            return WeightShape((b[0], math.prod(a[1:])), "convolution", a[2:])
        return WeightShape((b[0], a[1]))


@dataclass(frozen=True)
class AdapterArrays:
    """An adapter on disk whose tensors are read when asked for.

    Attributes:
        path: The folder.
        config: Its description.
        modules: Path of the module -> where its tensors lie.
        weight: What the update is multiplied with, beside its scaling.
    """

    path: Path
    config: LoRAConfig
    modules: Mapping[str, ModuleArrays]
    weight: float = 1.0

    def read(self, module: str) -> dict[str, Array]:
        """The tensors of a module, in float32 or wider.

        Raises:
            NonFiniteError: one holds NaN or infinity.
        """
        arrays = {}
        for name, stored in self.modules[module].tensors.items():
            number = BY_SAFETENSORS[stored.dtype]
            array = number.decode(np.frombuffer(bytearray(read(stored.span)), number.stored))
            if not np.isfinite(array).all():
                raise NonFiniteError(
                    f"{self.path / WEIGHTS_NAME}: {name} of {module!r} holds NaN or infinity."
                )
            arrays[name] = array.reshape(stored.shape)
        return arrays

    def scaling(self, module: str) -> float:
        """What ``B A`` of a module is multiplied with."""
        return self.weight * self.config.scaling_for(module)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Path of each layer that repeats the adapter of an embedding -> the embedding's.

        It does where ``ensure_weight_tying`` says that both have one weight.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        if not self.config.ensure_weight_tying:
            return {}
        tables = {m: self.read(m) for m, held in self.modules.items() if held.kind == "embedding"}
        linear = {m: self.read(m) for m, held in self.modules.items() if held.kind == "linear"}
        return {
            module: table
            for module, own in linear.items()
            for table, of_table in tables.items()
            if np.array_equal(own["lora_A"], of_table["lora_B"].T)
            and np.array_equal(own["lora_B"], of_table["lora_A"].T)
        }

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
                    for array in self.read(name).values()
                ],
            )
            for name in sorted(self.modules)
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
            hint=_IN_TORCH,
        )
    modules = _by_module(read_header(weights_file, AdapterFormatError), weights_file)
    config = from_peft(raw, str(config_file), list(modules))
    _require_mergeable(raw, config_file)
    for name, module in modules.items():
        _check_module(name, module, config, folder)
    if config.use_dora and weight != 1.0:
        raise ConfigError(
            f"{folder} is an adapter with DoRA, which sets the length of the whole weight: it can "
            f"only count once, and its weight must be 1, got {weight}."
        )
    return AdapterArrays(folder, config, modules, float(weight))


def _require_mergeable(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse what would be left out in silence: weights of the base that were trained whole."""
    fields = ("modules_to_save", "target_parameters", "trainable_token_indices")
    asked = [name for name in fields if raw.get(name)]
    if raw.get("bias") not in (None, "none"):
        asked.append("bias")
    if raw.get("use_dora") and raw.get("lora_bias"):
        asked.append("lora_bias")  # with DoRA
    if asked:
        raise ConfigError(
            f"{file}: {asked[0]} = {raw[asked[0]]!r} asks for more than can be merged into files.",
            hint=_IN_TORCH,
        )


def _check_module(name: str, module: ModuleArrays, config: LoRAConfig, folder: Path) -> None:
    """Hold a module's tensors against the config."""
    a, b = (module.tensors[factor] for factor in _FACTORS)
    if a.shape[0] != config.rank_for(name):
        raise AdapterFormatError(
            f"{folder}: the rank of {name!r} is {config.rank_for(name)} by {CONFIG_NAME} (r, "
            f"rank_pattern), but its weights have lora_A {a.shape} and lora_B {b.shape}."
        )
    for field, tensor in (("use_dora", "lora_magnitude"), ("lora_bias", "lora_bias")):
        if getattr(config, field) != (tensor in module.tensors):
            there = "a" if tensor in module.tensors else "no"
            raise AdapterFormatError(
                f"{folder}: {CONFIG_NAME} says {field} = {getattr(config, field)}, and "
                f"{WEIGHTS_NAME} holds {there} {tensor} of {name!r}."
            )


def _by_module(tensors: Mapping[str, Stored], file: Path) -> dict[str, ModuleArrays]:
    found: dict[str, dict[str, Stored]] = {}
    kinds: dict[str, Kind] = {}
    for key, stored in tensors.items():
        if key.endswith(f"{WRAPPED}.weight"):
            continue  # the table of an adapted embedding or head, the base's own, saved along
        parts = module_of(key.removesuffix(".weight") if key.endswith(OLD_MAGNITUDE) else key)
        if parts is None or parts[1] not in ("linear", "embedding"):
            raise AdapterFormatError(
                f"{file} holds {key!r}, which is no part of an adapter on a linear layer, an "
                "embedding or a convolution.",
                hint=_IN_TORCH,
            )
        module, kind, name = parts
        if found.setdefault(module, {}).setdefault(name, stored) is not stored:
            raise AdapterFormatError(f"{file} holds {name} of {module!r} twice.")
        if name == "lora_A":
            kinds[module] = kind
    if not found:
        raise AdapterFormatError(f"{file} holds no tensors, so it is no adapter.")
    for module, pair in found.items():
        _check_shapes(module, pair, file)
    return {
        module: ModuleArrays(kinds[module], {name: held[name] for name in _TENSORS if name in held})
        for module, held in sorted(found.items())
    }


def _check_shapes(module: str, pair: Mapping[str, Stored], file: Path) -> None:
    if missing := [name for name in _FACTORS if name not in pair]:
        raise AdapterFormatError(f"{file} holds no {missing[0]} of {module!r}.")
    a, b = (pair[name] for name in _FACTORS)
    flat = len(a.shape) == len(b.shape) >= 2 and set(b.shape[2:]) <= {1}
    if not flat or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        grouped = flat and len(a.shape) > 2 and b.shape[1] and a.shape[0] % b.shape[1] == 0
        raise AdapterFormatError(
            f"{file}: the factors of {module!r} do not fit each other, got lora_A {a.shape} and "
            f"lora_B {b.shape}.",
            hint="Adapters of grouped convolutions are merged in torch (gauge_ext.merge)."
            if grouped
            else None,
        )
    for name in ("lora_magnitude", "lora_bias"):
        if name in pair and math.prod(pair[name].shape) != b.shape[0]:
            raise AdapterFormatError(
                f"{file}: {name} of {module!r} must have {b.shape[0]} entries, as lora_B has rows, "
                f"got {pair[name].shape}."
            )
    if a.dtype != b.dtype or any(s.dtype not in BY_SAFETENSORS for s in pair.values()):
        raise AdapterFormatError(
            f"{file}: the factors of {module!r} must be of one floating-point dtype, got {a.dtype} "
            f"and {b.dtype}."
        )
