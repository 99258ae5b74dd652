"""An adapter from wherever it lies, as the arrays that a graph takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from gauge_ext.errors import AdapterFormatError, AdapterMismatchError, NonFiniteError
from gauge_ext.export.adapters.table import AdapterTable, Arrays

SUFFIX = ".onnx_adapter"
TENSORS = ".safetensors"
PREFIX = "gauge_ext."  # of what a file says about itself
VERSION_KEY = f"{PREFIX}graph_version"


def read_arrays(
    table: AdapterTable, source: str | Path | Mapping[str, ArrayLike], what: str
) -> Arrays:
    """Read an adapter and check that it fits.

    Args:
        table: The graph's inputs.
        source: An ``.onnx_adapter`` or ``.safetensors`` file written for the graph, a folder in
            PEFT's format, or arrays by the graph's inputs.
        what: The adapter's name, for messages.

    Raises:
        AdapterFormatError: it is missing, damaged, or none.
        AdapterMismatchError: it was made for another graph.
        NonFiniteError: an array holds NaN or infinity.
    """
    if isinstance(source, Mapping):
        arrays = {name: np.array(array) for name, array in source.items()}
        version = table.version
    else:
        path = Path(source)
        if not path.exists():
            raise AdapterFormatError(f"{what}: there is no {path}.")
        if path.is_dir():
            from gauge_ext.export.adapters.file import effective_factors

            factors, _, name = effective_factors(path)
            arrays, version = table.pack(factors, name), table.version
        elif path.suffix == SUFFIX:
            arrays, version, _ = _read_onnx_adapter(path)
        elif path.suffix == TENSORS:
            arrays, said = _read_safetensors(path)
            version = int(said[VERSION_KEY])
        else:
            raise AdapterFormatError(
                f"{what}: {path} must be a folder in PEFT's format or a file that ends in "
                f"{SUFFIX} or {TENSORS}."
            )
    # Names first: they say more than a number.
    table.check(arrays, what)
    if version != table.version:
        raise AdapterMismatchError(
            f"{what} was written for another graph: its names and shapes fit, its base or "
            "precision do not.",
            hint="Write it again for this graph: gauge-ext onnx-adapter.",
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NonFiniteError(f"{what}: {name} holds NaN or infinity.")
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def read_origin(path: Path) -> dict[str, str]:
    """What an adapter's file for a graph says about itself, keys without prefix.

    Raises:
        AdapterFormatError: it is damaged, or was not written for a graph.
    """
    if path.suffix == TENSORS:
        said = _read_safetensors(path)[1]
        return {k.removeprefix(PREFIX): v for k, v in said.items() if k.startswith(PREFIX)}
    _, version, number = _read_onnx_adapter(path)
    return {"adapter_number": str(number), "graph_version": str(version)}


def _read_onnx_adapter(path: Path) -> tuple[Arrays, int, int]:
    import onnxruntime

    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        # A copy: the arrays are views of memory that the file's object owns.
        arrays = {name: value.numpy().copy() for name, value in file.get_parameters().items()}
        return arrays, int(file.get_model_version()), int(file.get_adapter_version())
    except Exception as error:  # onnxruntime's exceptions have no other common base
        raise AdapterFormatError(
            f"{path} is damaged or no adapter of onnxruntime: {str(error).strip()}",
            hint="Write it again: gauge-ext onnx-adapter.",
        ) from error


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            # The file is no mapping: it has keys() and cannot be iterated.
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFormatError(f"{path} is damaged or no safetensors file: {error}.") from error
    if not said.get(VERSION_KEY, "").isdecimal():
        found = f": its {VERSION_KEY} is {said[VERSION_KEY]!r}" if VERSION_KEY in said else ""
        raise AdapterFormatError(
            f"{path} was not written for a graph{found}.",
            hint="Give the adapter's folder, or write it for this graph: gauge-ext onnx-adapter.",
        )
    return arrays, said
