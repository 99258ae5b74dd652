"""A transformers folder, read without transformers: where each tensor lies, and what belongs to it.

The safetensors format (huggingface/safetensors, "Format"): eight bytes with the length N of the
header (little endian), N bytes of JSON (name -> dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gauge_ext.checkpoint import AdapterCheckpoint
from gauge_ext.errors import AdapterMismatchError, ConfigError

FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Weights in any format but the one that is merged: they would be the unmerged base under the name
# of the merged model.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot"),
    *(".gguf", ".onnx", ".onnx_data", ".tflite"),
)
_UNTIE = "Merge in memory with gauge_ext.merge(), and save with config.tie_word_embeddings = False."
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        file: The safetensors file, relative to the folder.
        dtype: Its dtype in the file's words, a key of ``FLOATS`` if it can be merged.
        shape: Its shape.
        offset: Its first byte, counted from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class BaseFolder:
    """A model's folder.

    Attributes:
        path: The folder.
        config: ``config.json``, empty if there is none.
        tensors: Name -> where it lies.
        carried: Other files that belong to the model, relative to the folder.
        skipped: Files left behind, relative to the folder: weights in other formats.
        nbytes: The size of all that belongs to the model.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    carried: tuple[Path, ...]
    skipped: tuple[Path, ...]
    nbytes: int


def open_base(path: Path) -> BaseFolder:
    """Reads the headers of a folder's weights and lists its files.

    Raises:
        ConfigError: the folder or a shard is missing or damaged, the weights are not safetensors,
            or they are quantized.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}.", hint="Give a local model folder.")
    config = _read_json(path / "config.json") if (path / "config.json").exists() else {}
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ConfigError(
            f"{path} is quantized ({method}): its weights are not numbers that an update can be "
            "added to.",
            hint="Merge into the unquantized base.",
        )
    shards = _shards(path)
    tensors: dict[str, Stored] = {}
    for shard in shards:
        tensors.update(_read_header(path, shard))
    carried, skipped = _other_files(path, set(shards))
    nbytes = sum((path / file).stat().st_size for file in (*shards, *carried))
    return BaseFolder(path, config, tensors, carried, skipped, nbytes)


def match_targets(base: BaseFolder, adapter: AdapterCheckpoint) -> dict[str, str]:
    """Finds the tensor that each adapted module's weight is stored in.

    A folder saved from the bare model lacks the prefix that the paths of a model with a head have
    (``bert.``, ``model.``), or the other way round; one prefix has to do for all modules.

    Returns:
        Name of the tensor -> path of the module.

    Raises:
        AdapterMismatchError: a module has no tensor, or one of another shape.
        ConfigError: a tensor is of a dtype that cannot be merged.
    """
    modules = list(adapter.tensors)
    fits = [
        found
        for rename in _renamings(modules[0], base)
        if len(found := {rename(module): module for module in modules}) == len(modules)
        and all(name in base.tensors for name in found)
    ]
    if len(fits) != 1:
        raise _mismatch(base, modules, ambiguous=len(fits) > 1)
    for name, module in fits[0].items():
        stored, pair = base.tensors[name], adapter.tensors[module]
        shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if stored.shape != (shape[::-1] if is_transposed(stored, adapter, module) else shape):
            raise AdapterMismatchError(
                f"the adapter for {module!r} is for a weight of shape {shape}, and {name} in "
                f"{base.path} has shape {stored.shape}.",
                hint="Is this the base that the adapter was trained on?",
            )
        if stored.dtype not in FLOATS:
            raise ConfigError(
                f"{name} in {base.path} is stored as {stored.dtype}, and an update can be "
                f"added to {', '.join(FLOATS)} only.",
                hint="Merge into the unquantized base.",
            )
        if _is_tied_head(base, stored):
            raise AdapterMismatchError(
                f"the adapter's {module!r} is the output layer, which {base.path} ties to its "
                "input embeddings: transformers would load it without the merged weight.",
                hint=_UNTIE,
            )
    return fits[0]


def is_transposed(stored: Stored, adapter: AdapterCheckpoint, module: str) -> bool:
    """Whether a weight lies as (in, out), as in transformers' Conv1D.

    The adapter says whether it is for such layers; beside them it may be for ordinary ones, which
    the shape tells apart unless it is square. In the models that have Conv1D, those are too.
    """
    pair = adapter.tensors[module]
    shape = (pair.lora_A.shape[1], pair.lora_B.shape[0])
    return adapter.config.fan_in_fan_out and stored.shape == shape


class _Rename:
    """Module path -> tensor name, with one prefix taken away and another put there."""

    def __init__(self, strip: str = "", add: str = "") -> None:
        self.strip, self.add = strip, add

    def __call__(self, module: str) -> str:
        return self.add + module.removeprefix(self.strip) + ".weight"


def _renamings(module: str, base: BaseFolder) -> list[_Rename]:
    """As it is if that fits, else every prefix that makes the first module fit."""
    weight = f"{module}.weight"
    if weight in base.tensors:
        return [_Rename()]
    longer = [_Rename(add=n.removesuffix(weight)) for n in base.tensors if n.endswith(f".{weight}")]
    shorter = [
        _Rename(strip=weight.removesuffix(n)) for n in base.tensors if weight.endswith(f".{n}")
    ]
    return longer + shorter


def _is_tied_head(base: BaseFolder, stored: Stored) -> bool:
    """Whether a weight has a row for each token, in a model that says that those are tied."""
    text = base.config.get("text_config", base.config)
    tied = base.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return bool(tied) and stored.shape[0] == text.get("vocab_size")


def _mismatch(base: BaseFolder, modules: list[str], *, ambiguous: bool) -> AdapterMismatchError:
    if ambiguous:
        return AdapterMismatchError(
            f"the adapter's {modules[0]!r} fits several tensors of {base.path}.",
            hint="Merge in memory with gauge_ext.merge() instead.",
        )
    missing = [module for module in modules if f"{module}.weight" not in base.tensors]
    shown = ", ".join(repr(module) for module in missing[:4]) + (", ..." if missing[4:] else "")
    if len(missing) < len(modules) and base.config.get("tie_word_embeddings", False):
        hint = f"This base ties its output to its input embeddings, stored once. {_UNTIE}"
    else:
        hint = (
            "Is this the base that the adapter was trained on? Its tensors are named like "
            f"{next(iter(base.tensors))!r}."
        )
    return AdapterMismatchError(
        f"{len(missing)} of the adapter's {len(modules)} modules have no weight in {base.path}: "
        f"{shown}.",
        hint=hint,
    )


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map.", hint="Download the base again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ConfigError(
                    f"{index} names the shard {name!r}, which is not in {path}.",
                    hint="Download the base again; a part of it is missing.",
                )
        return [Path(name) for name in names]
    if (path / "model.safetensors").is_file():
        return [Path("model.safetensors")]
    pickles = sorted(file.name for file in path.glob("*.bin"))
    raise ConfigError(
        f"{path} has neither model.safetensors nor model.safetensors.index.json"
        + (f", only {pickles[0]}." if pickles else "."),
        hint="Load it in transformers and save_pretrained() it, which writes safetensors."
        if pickles
        else "Give a model folder as transformers saves it.",
    )


def _read_header(path: Path, shard: Path) -> dict[str, Stored]:
    file = path / shard
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise ValueError(f"it should have {end} bytes and has {size}")
        return {
            name: Stored(
                shard,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise ConfigError(
            f"{file} is not a whole safetensors file: {error}.", hint="Download the base again."
        ) from error


def _other_files(path: Path, shards: set[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    modules = path / "modules.json"  # of sentence-transformers: more modules, in folders
    entries = _read_json(modules) if modules.exists() else []
    parts = {str(entry.get("path", "")) for entry in entries} - {""}
    carried, skipped = [], []
    for file in sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()):
        if file in shards or any(part.startswith(".") for part in file.parts):
            continue
        weights = file.suffix in _WEIGHTS or file.name.endswith(".bin.index.json")
        # transformers would put an adapter that it finds there on top of the merged weights.
        if (weights and str(file.parent) not in parts) or file.name == "adapter_config.json":
            skipped.append(file)
        else:
            carried.append(file)
    return tuple(carried), tuple(skipped)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
