"""The names in an adapter's folder: files, and the keys of its tensors.

The key of a factor is ``base_model.model.`` + the module's path + ``.lora_A.weight`` or
``.lora_B.weight``. The prefix is that of PEFT's wrapper classes; writers that have no wrapper
(diffusers, ``inject_adapter_in_model``) leave it out, and PEFT and we read both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gauge_ext.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

    from gauge_ext.adapters import Adapter, Kind, LoRAConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CARD_NAME = "README.md"

PREFIX = "base_model.model."

# What follows the module's path in the key of each tensor, by the kind of the adapter.
_COMMON = {"lora_magnitude": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}
SUFFIXES: dict[Kind, dict[str, str]] = {
    "linear": {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", **_COMMON},
    "embedding": {"lora_A": ".lora_embedding_A", "lora_B": ".lora_embedding_B", **_COMMON},
    "out_proj": {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"},
    # After the "linear" ones, as which such keys are read: see with_parameters().
    "parameter": {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"},
    # They lie beside, as parameters that are trained whole.
    "tokens": {},
}
# PEFT wraps nn.MultiheadAttention, and its output projection again inside the wrapper.
_OUT_PROJ = ".base_layer.out_proj"
# As PEFT up to 0.12 wrote it.
OLD_MAGNITUDE = ".lora_magnitude_vector.weight"
# A parameter of the base below PEFT's wrapper, such as a bias that was trained.
WRAPPED = ".base_layer"

# What other kinds of LoRA leave in a file, by a part of the key -> what it is. The first hit names
# the key in the error.
_FOREIGN = (
    (".lora_diag", "the diagonal of KaSA (kasa_config)"),
    (".lora_E", "an AdaLoRA factor"),
    (".trainable_tokens_", "trained tokens (trainable_token_indices)"),
    (".base_layer.", "an adapter inside another one"),
    (".lora_", "a part of an adapter that is no tensor of LoRA's"),
)


@dataclass(frozen=True)
class LoRAPair:
    """The two factors of one module's update, and what else its adapter has.

    Attributes:
        lora_A: ``(r, in)``; of a convolution ``(r, in, *kernel)``, of E stacked matrices
            ``(r E, in)``.
        lora_B: ``(out, r)``, of lora_A's dtype; of a convolution ``(out, r / groups, 1, ...)``, of
            stacked matrices ``(out, r E)``.
        lora_magnitude: That of DoRA, ``(out,)`` or ``(1, out, 1, ...)``; None for none.
        lora_bias: That of the branch, ``(out,)``; None for none.
        kind: How they are laid out and named, see :class:`~gauge_ext.adapters.Adapter`.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude: Tensor | None = None
    lora_bias: Tensor | None = None
    kind: Kind = "linear"

    @classmethod
    def of(cls, adapter: Adapter) -> LoRAPair:
        """Return the tensors of an adapter on a model; they are not copied."""
        return cls(**adapter.adapter_tensors(), kind=adapter.kind)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by their names here."""
        found = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude is not None:
            found["lora_magnitude"] = self.lora_magnitude
        if self.lora_bias is not None:
            found["lora_bias"] = self.lora_bias
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it is two matrices on a linear layer, and nothing else."""
        return self.kind == "linear" and len(self.tensors) == 2 and self.lora_A.dim() == 2

    @property
    def rank(self) -> int:
        """The number of rows of lora_A; for stacked matrices it is E times the rank of each."""
        return self.lora_A.shape[0]


def turned(pair: LoRAPair) -> LoRAPair:
    """Return an embedding's factors as those of a linear layer with the same table."""
    return LoRAPair(pair.lora_B.mT, pair.lora_A.mT)


def keys_of(module: str, pair: LoRAPair) -> dict[str, Tensor]:
    """Return the tensors of the module at path ``module`` under their keys."""
    suffixes = SUFFIXES[pair.kind]
    if pair.kind == "out_proj":
        module = f"{module.removesuffix('.out_proj')}{_OUT_PROJ}"
    return {f"{PREFIX}{module}{suffixes[name]}": tensor for name, tensor in pair.tensors.items()}


def module_of(key: str) -> tuple[str, Kind, str] | None:
    """Return the module's path, the adapter's kind and the tensor's name, or None for other keys.

    Args:
        key: Such as ``base_model.model.encoder.query.lora_A.weight``.
    """
    for kind, suffixes in SUFFIXES.items():
        for name, suffix in suffixes.items():
            if key.endswith(suffix):
                path = _bare(key.removesuffix(suffix))
                if path.endswith(_OUT_PROJ):
                    path, kind = f"{path.removesuffix(_OUT_PROJ)}.out_proj", "out_proj"
                # A module inside PEFT's own wrapper has no path in the bare model; the wrapper
                # itself is one of a parameter.
                return (path, kind, name) if path and WRAPPED not in unwrapped(path) else None
    return None


def unwrapped(path: str) -> str:
    """Return a path without the wrappers of PEFT at its end."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def with_parameters(
    pairs: Mapping[str, LoRAPair], config: LoRAConfig, where: str
) -> dict[str, LoRAPair]:
    """Tell the adapters on bare parameters from the others: the config does, their keys do not.

    Raises:
        AdapterFormatError: An adapter lies inside another one, and the config speaks of no
            parameters.
    """
    found = dict(pairs)
    for name, pair in pairs.items():
        nested = name.endswith(WRAPPED) or f"{name}{WRAPPED}" in pairs
        if nested and not config.target_parameters:
            raise _strange([f"{unwrapped(name)}{WRAPPED}.lora_A.weight"], where)
        if config.target_parameters and (nested or not config.selects(name)):
            found[name] = dataclasses.replace(pair, kind="parameter")
    return found


def _bare(path: str) -> str:
    """A path without what PEFT's and torch.compile's wrappers put in front."""
    return path.removeprefix(PREFIX).removeprefix("_orig_mod.")


def whole_key(path: str, pairs: Mapping[str, LoRAPair]) -> str:
    """Return the key of a whole parameter of the base, which lies below PEFT's wrapper or not."""
    module, _, name = path.rpartition(".")
    while module in pairs:
        module += WRAPPED
    return f"{PREFIX}{module}.{name}"


def sort_out(
    tensors: dict[str, Tensor], where: str, *, whole: bool = False
) -> tuple[dict[str, LoRAPair], dict[str, Tensor]]:
    """Sort the tensors of a file into adapters by module, and whole parameters of the base.

    Args:
        tensors: Key -> tensor.
        where: The file, for messages.
        whole: Whether the config speaks of parameters that were trained whole (``modules_to_save``,
            ``bias``). Those below PEFT's own wrapper are known without that.

    Returns:
        Path of the module -> its adapter, and path of the parameter -> its value, both sorted.

    Raises:
        AdapterFormatError: A key belongs to neither, a factor lacks its partner, or the tensors of
            an adapter do not fit each other.
    """
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, Kind] = {}
    others: dict[str, Tensor] = {}
    strange = []
    for key, tensor in tensors.items():
        parts = module_of(key.removesuffix(".weight") if key.endswith(OLD_MAGNITUDE) else key)
        if parts is not None:
            module, kind, name = parts
            if name in found.setdefault(module, {}):
                raise AdapterFormatError(f"{where} holds {name} of {module!r} twice.")
            found[module][name] = tensor
            if name == "lora_A":
                kinds[module] = kind
            continue
        module, _, name = _bare(key).rpartition(".")
        below = module.endswith(WRAPPED)
        if (below or whole) and ".lora_" not in key and WRAPPED not in unwrapped(module):
            others[f"{unwrapped(module)}.{name}".lstrip(".")] = tensor
        else:
            strange.append(key)
    if strange:
        raise _strange(strange, where)
    if not found:
        raise AdapterFormatError(f"{where} holds no tensors, so it is no adapter.")
    pairs = {
        module: _pair(module, kinds.get(module, "linear"), factors, where)
        for module, factors in sorted(found.items())
    }
    return pairs, dict(sorted(others.items()))


def _pair(module: str, kind: Kind, factors: dict[str, Tensor], where: str) -> LoRAPair:
    for name in ("lora_A", "lora_B"):
        if name not in factors:
            held = ", ".join(factors)
            raise AdapterFormatError(f"{where} holds {held} of {module!r} but no {name}.")
    a, b = factors["lora_A"], factors["lora_B"]
    shapes = f"got lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    convolution = kind == "linear" and a.dim() in (3, 4, 5)
    fits = a.dim() == b.dim() and (a.dim() == 2 or convolution) and set(b.shape[2:]) <= {1}
    if not fits or 0 in (*a.shape, *b.shape):
        raise AdapterFormatError(
            f"{where}: the factors of {module!r} must be matrices, lora_A (r, in) and lora_B "
            f"(out, r), or those of a convolution, (r, in, *kernel) and (out, r, 1, ...); {shapes}."
        )
    # A grouped convolution has r / groups columns in B.
    if a.shape[0] % b.shape[1] if convolution else a.shape[0] != b.shape[1]:
        raise AdapterFormatError(
            f"{where}: the factors of {module!r} have different ranks, {a.shape[0]} and "
            f"{b.shape[1]}; {shapes}."
        )
    for name, size in (("lora_magnitude", b.shape[0]), ("lora_bias", b.shape[0])):
        if name in factors and factors[name].numel() != size:
            raise AdapterFormatError(
                f"{where}: {name} of {module!r} must have {size} entries, as lora_B has rows, got "
                f"{tuple(factors[name].shape)}."
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
                    hint="Merge the adapter with the library that made it.",
                )
    shown = ", ".join(repr(key) for key in keys[:4]) + (", ..." if len(keys) > 4 else "")
    return AdapterFormatError(
        f"{where} holds {len(keys)} tensors that are no LoRA factors: {shown}.",
        hint="If they are weights of the base that were trained whole, the config has to say so "
        "(modules_to_save, bias).",
    )
