"""The weights of a whole model, some rows at a time: from a folder's shards or from memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError

# The dtypes that hold numbers, by safetensors' names; all others are codes.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Protocol):
    """Named tensors that are read when asked for.

    Attributes:
        name: What errors call them.
        shapes: Name of each tensor -> its shape.
        dtypes: Name of each tensor of floating-point numbers -> its dtype; other tensors are not in
            it.
        config: ``config.json`` of the folder, or what a model of transformers has for it, or empty.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    config: Mapping[str, Any]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``tensor[start:stop]`` of a tensor of at least one dimension."""

    def whole(self, name: str) -> Tensor:
        """Return a tensor."""


class StateWeights:
    """The tensors of a model that is in memory."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str = "the model",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.config: Mapping[str, Any] = config or {}
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {
            key: tuple(tensor.shape) for key, tensor in tensors.items()
        }
        self.dtypes: Mapping[str, torch.dtype] = {
            key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype in _FLOATS.values()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``tensor[start:stop]``."""
        return self._tensors[name].detach()[start:stop]

    def whole(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name].detach()


class FolderWeights:
    """The safetensors of a transformers folder, in one file or in shards; nothing is kept of them.

    Args:
        path: The folder.

    Raises:
        ConfigError: There is no such folder, it has no safetensors weights, or a shard is missing
            or damaged, or the weights are quantized.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = Path(path)
        self.name = str(folder)
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}.", hint="Give a local model folder.")
        file = folder / "config.json"
        self.config: Mapping[str, Any] = _read_json(file) if file.is_file() else {}
        if "quantization_config" in self.config:
            raise ConfigError(
                f"{folder} is quantized: its weights are codes, whose difference means nothing.",
                hint="Give the unquantized model.",
            )
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for shard in _shards(folder):
            opened = _open(shard)
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(key)
                shapes[key] = tuple(view.get_shape())
                if (dtype := _FLOATS.get(view.get_dtype())) is not None:
                    dtypes[key] = dtype
                self._files[key] = opened
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, torch.dtype] = dtypes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read ``tensor[start:stop]`` from its shard."""
        found: Tensor = self._files[name].get_slice(name)[start:stop]
        return found

    def whole(self, name: str) -> Tensor:
        """Read a tensor from its shard."""
        found: Tensor = self._files[name].get_tensor(name)
        return found


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads each tensor when asked for it.

    Args:
        path: The file.

    Raises:
        ConfigError: It is missing, damaged, or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _open(Path(path))
        self._names: tuple[str, ...] = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(source: Weights | nn.Module | str | os.PathLike[str]) -> Weights:
    """Return the weights of a model in memory or of a folder.

    Raises:
        ConfigError: See :class:`FolderWeights`.
    """
    if isinstance(source, nn.Module):
        to_dict = getattr(getattr(source, "config", None), "to_dict", None)
        config = to_dict() if callable(to_dict) else None
        return StateWeights(source.state_dict(), type(source).__name__, config)
    if isinstance(source, str | os.PathLike):
        return FolderWeights(source)
    return source


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        table = _read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ConfigError(f"{index} has no weight_map.", hint="Download the model again.")
        names = sorted({str(name) for name in table.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConfigError(
                    f"{index} names the shard {name!r}, which is not in {folder}.",
                    hint="Download the model again; a part of it is missing.",
                )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter, not a model.", hint="Merge it first: gauge-ext merge."
        )
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    raise ConfigError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}"
        + (f", only {pickles[0]}." if pickles else "."),
        hint="Load it in transformers and save_pretrained() it, which writes safetensors."
        if pickles
        else "Give a model folder as transformers saves it.",
    )


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{file} is not a whole safetensors file: {str(error).rstrip('.')}.",
            hint="Copy or download it again.",
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content
