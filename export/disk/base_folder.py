"""A transformers folder, read without transformers: its files, and where each tensor lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.safetensors_file import Stored, read_header

# Weights in any format but the one that is merged: they would be the unmerged base under the name
# of the merged model.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot"),
    *(".gguf", ".onnx", ".onnx_data", ".tflite"),
)


@dataclass(frozen=True)
class BaseFolder:
    """A model's folder.

    Attributes:
        path: The folder.
        config: ``config.json``, empty if there is none.
        tensors: Name -> where it lies.
        shards: The files with the weights, relative to the folder.
        carried: Other files that belong to the model, relative to the folder.
        skipped: Files left behind, relative to the folder: weights in other formats.
        nbytes: The size of all that belongs to the model.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    shards: tuple[Path, ...]
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
        for name, stored in read_header(path / shard).items():
            if tensors.setdefault(name, stored) is not stored:
                raise ConfigError(
                    f"{path} holds {name!r} twice, in {tensors[name].span.path.name} and {shard}.",
                    hint="Download the base again, into an empty folder.",
                )
    carried, skipped = _other_files(path, set(shards))
    nbytes = sum((path / file).stat().st_size for file in (*shards, *carried))
    return BaseFolder(path, config, tensors, tuple(shards), carried, skipped, nbytes)


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
