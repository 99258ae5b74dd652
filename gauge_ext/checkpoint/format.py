"""The names in an adapter's folder: files, and the keys of its tensors.

The key of a factor is ``base_model.model.`` + the module's path + ``.lora_A.weight`` or
``.lora_B.weight``. The prefix is that of PEFT's wrapper classes; writers that have no wrapper
(diffusers, ``inject_adapter_in_model``) leave it out, and PEFT and we read both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gauge_ext.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from gauge_ext.adapters import Adapter, Kind

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CARD_NAME = "README.md"

PREFIX = "base_model.model."

# What follows the module's path in the key of each tensor, by the kind of the adapter.
SUFFIXES: dict[Kind, dict[str, str]] = {
    "linear": {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"},
}

# What other kinds of LoRA leave in a file, by a part of the key -> what it is. The first hit names
# the key in the error.
_FOREIGN = (
    (".lora_magnitude_vector", "the magnitude of DoRA (use_dora)"),
    (".lora_embedding_", "an adapter on an embedding"),
    (".lora_B.bias", "the bias of an adapter (lora_bias)"),
    (".lora_diag", "the diagonal of KaSA (kasa_config)"),
    (".lora_E", "an AdaLoRA factor"),
    (".trainable_tokens_", "trained tokens (trainable_token_indices)"),
    (".base_layer.", "a weight of the base model, or a layer inside nn.MultiheadAttention"),
    (".lora_", "a part of an adapter that is neither lora_A.weight nor lora_B.weight"),
)
_WHOLE_WEIGHT = "a whole weight of the base model (modules_to_save, bias or a saved embedding)"


@dataclass(frozen=True)
class LoRAPair:
    """The two factors of one module's update.

    Attributes:
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``, of lora_A's dtype.
        kind: How they are laid out and named, see :class:`~gauge_ext.adapters.Adapter`.
    """

    lora_A: Tensor
    lora_B: Tensor
    kind: Kind = "linear"

    @classmethod
    def of(cls, adapter: Adapter) -> LoRAPair:
        """Return the tensors of an adapter on a model; they are not copied."""
        return cls(**adapter.adapter_tensors(), kind=adapter.kind)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by their names here."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]


def keys_of(module: str, pair: LoRAPair) -> dict[str, Tensor]:
    """Return the tensors of the module at path ``module`` under their keys."""
    suffixes = SUFFIXES[pair.kind]
    return {f"{PREFIX}{module}{suffixes[name]}": tensor for name, tensor in pair.tensors.items()}


def module_of(key: str) -> tuple[str, Kind, str] | None:
    """Return the module's path, the adapter's kind and the tensor's name, or None for other keys.

    Args:
        key: Such as ``base_model.model.encoder.query.lora_A.weight``.
    """
    for kind, suffixes in SUFFIXES.items():
        for name, suffix in suffixes.items():
            if key.endswith(suffix):
                path = key.removesuffix(suffix).removeprefix(PREFIX)
                # torch.compile's wrapper leaves its own name in the paths of what it wraps.
                path = path.removeprefix("_orig_mod.")
                # A module inside PEFT's own wrapper has no path in the bare model.
                return (path, kind, name) if path and ".base_layer" not in f".{path}" else None
    return None


def pair_up(tensors: dict[str, Tensor], where: str) -> dict[str, LoRAPair]:
    """Sort the tensors of a file into pairs of factors by module.

    Args:
        tensors: Key -> tensor.
        where: The file, for messages.

    Raises:
        AdapterFormatError: A key belongs to no plain LoRA factor, a factor lacks its partner, or
            the two do not fit each other.
    """
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, Kind] = {}
    strange = []
    for key, tensor in tensors.items():
        if (parts := module_of(key)) is None:
            strange.append(key)
            continue
        module, kind, name = parts
        if name in found.setdefault(module, {}):
            raise AdapterFormatError(f"{where} holds {name} of {module!r} twice.")
        found[module][name] = tensor
        kinds[module] = kind
    if strange:
        raise _strange(strange, where)
    if not found:
        raise AdapterFormatError(f"{where} holds no tensors, so it is no adapter.")
    return {
        module: _pair(module, kinds[module], factors, where)
        for module, factors in sorted(found.items())
    }


def _pair(module: str, kind: Kind, factors: dict[str, Tensor], where: str) -> LoRAPair:
    for name, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if name not in factors:
            raise AdapterFormatError(f"{where} holds {other} of {module!r} but no {name}.")
    a, b = factors["lora_A"], factors["lora_B"]
    shapes = f"got lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        raise AdapterFormatError(
            f"{where}: the factors of {module!r} must be matrices, lora_A (r, in) and lora_B "
            f"(out, r); {shapes}.",
            hint="Only adapters on linear layers are supported." if a.dim() > 2 else None,
        )
    if a.shape[0] != b.shape[1]:
        raise AdapterFormatError(
            f"{where}: the factors of {module!r} have different ranks, {a.shape[0]} and "
            f"{b.shape[1]}; {shapes}."
        )
    if a.dtype != b.dtype or not a.is_floating_point():
        raise AdapterFormatError(
            f"{where}: the factors of {module!r} must be of one floating-point dtype, got "
            f"{a.dtype} and {b.dtype}."
        )
    return LoRAPair(**factors, kind=kind)


def _strange(keys: Iterable[str], where: str) -> AdapterFormatError:
    keys = sorted(keys)
    for key in keys:
        for part, meaning in _FOREIGN:
            if part in key:
                return AdapterFormatError(
                    f"{where} holds {key!r}: {meaning}, which is not supported.",
                    hint="Only plain LoRA factors on linear layers are; merge the adapter with the "
                    "library that made it.",
                )
    shown = ", ".join(repr(key) for key in keys[:4]) + (", ..." if len(keys) > 4 else "")
    return AdapterFormatError(
        f"{where} holds {len(keys)} tensors that are no LoRA factors: {shown}.",
        hint=f"Each is {_WHOLE_WEIGHT}, or the file is no adapter.",
    )
