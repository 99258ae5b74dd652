"""What an exported file says about itself, and whether that is true of given files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.file import adapter_number
from gauge_ext.export.adapters.read import SUFFIX, TENSORS, read_origin
from gauge_ext.export.checks import require_packages
from gauge_ext.export.language.model_folder import MANIFEST, file_sha256, origin_of
from gauge_ext.export.metadata import PREFIX, base_sha256

if TYPE_CHECKING:
    from torch import nn

# JSON in JSON
_REST = frozenset(
    {
        *("parameters", "dynamic_dims", "adapted_layers", "validation", "generation"),
        *("adapter_inputs", "gauges", "loss"),
    }
)


@dataclass(frozen=True)
class Check:
    """One claim of a file.

    Attributes:
        what: What was checked: ``base_sha256``, ``adapter_sha256``, ``adapter_number``, a file of
            the manifest, or what the manifest says of a graph.
        claimed: What the file says; None where it says nothing.
        found: What is so; None where the file is missing.
    """

    what: str
    claimed: str | None
    found: str | None

    @property
    def passed(self) -> bool:
        """Whether the two are the same."""
        return self.claimed is not None and self.claimed == self.found


@dataclass(frozen=True)
class Provenance:
    """The origin of an export.

    Attributes:
        path: The file or folder.
        graphs: Name of each graph, or of an adapter's file -> what it says, keys without prefix.
        checks: What was compared.
    """

    path: Path
    graphs: dict[str, dict[str, str]]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether everything that was compared is so."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "path": str(self.path),
            "graphs": {
                name: {
                    key: json.loads(value) if key in _REST else value for key, value in said.items()
                }
                for name, said in self.graphs.items()
            },
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
            "passed": self.passed,
        }


def read_provenance(path: str | Path) -> Provenance:
    """Reads the metadata of a file, or of each graph of a folder, whose manifest is checked too.

    Args:
        path: An ONNX file, an adapter's file for a graph (``.onnx_adapter``, ``.safetensors``), or
            a folder with a ``gauge_ext.json``.

    Returns:
        What they say. ``checks`` compares the manifest with the folder's files and with what its
        graphs say; it is empty for a single file.

    Raises:
        ConfigError: there is no such file, it is no ONNX file, or nothing in it is from gauge_ext.
    """
    path = Path(path)
    if path.is_file():
        adapter = path.suffix in {SUFFIX, TENSORS}
        said = _whole(path, read_origin(path) if adapter else _metadata(path))
        return Provenance(path, {path.name: said}, ())
    if not path.is_dir():
        raise ConfigError(f"there is no file or folder {path}.", hint="Give an exported file.")
    manifest = path / MANIFEST
    try:
        written = json.loads(manifest.read_text(encoding="utf-8"))
        claims = {str(name): str(entry["sha256"]) for name, entry in written["files"].items()}
        origins = {str(name): dict(said) for name, said in written["graphs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} has no {MANIFEST} that can be read: {error}.",
            hint="Give a folder that gauge-ext export wrote, or a file.",
        ) from error
    checks = []
    for name, claimed in claims.items():
        if Path(name).name != name:
            raise ConfigError(f"{manifest} names {name!r}, which is not a file of its folder.")
        file = path / name
        checks.append(Check(name, claimed, file_sha256(file) if file.is_file() else None))
    names = sorted(name for name in claims if name.endswith(".onnx") and (path / name).is_file())
    graphs = {name: _whole(path / name, _metadata(path / name)) for name in names}
    for name, origin in origins.items():
        found = origin_of(graphs[name]) if name in graphs else {}
        checks += [
            Check(f"{key} of {name}", str(claim), found.get(key)) for key, claim in origin.items()
        ]
    return Provenance(path, graphs, tuple(checks))


def check_provenance(
    said: Provenance, *, model: nn.Module | None = None, adapter_sha256: str | None = None
) -> Provenance:
    """Adds the comparison with a base model and with an adapter.

    Args:
        said: What :func:`read_provenance` read.
        model: The base, loaded as it was for the export (float32, the same class).
        adapter_sha256: As :attr:`gauge_ext.checkpoint.AdapterCheckpoint.sha256` of the adapter's
            folder.

    Returns:
        The same with more checks, for each graph.
    """
    checks = list(said.checks)
    for name, found in (
        ("base_sha256", None if model is None else base_sha256(model)),
        ("adapter_sha256", adapter_sha256),
    ):
        if found is None:
            continue
        # Of an .onnx_adapter only a number is known.
        short = {g: t for g, t in said.graphs.items() if "adapter_number" in t}
        if name == "adapter_sha256" and short:
            number = str(adapter_number(found))
            checks += [Check("adapter_number", t["adapter_number"], number) for t in short.values()]
            continue
        checks += [
            Check(name if len(said.graphs) == 1 else f"{name} of {graph}", text.get(name), found)
            for graph, text in said.graphs.items()
        ]
    return Provenance(said.path, said.graphs, tuple(checks))


def _whole(path: Path, said: dict[str, str]) -> dict[str, str]:
    """What a file says, with its JSON checked."""
    for key in _REST.intersection(said):
        try:
            json.loads(said[key])
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged: what it says of {PREFIX}{key} is no JSON: {error}."
            ) from error
    return said


def _metadata(path: Path) -> dict[str, str]:
    require_packages("onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{path} is not an ONNX file: {error}.") from error
    found: Mapping[str, str] = {entry.key: entry.value for entry in model.metadata_props}
    # protobuf gives bytes for what is no UTF-8.
    if not all(isinstance(text, str) for entry in found.items() for text in entry):
        raise ConfigError(f"{path} is not an ONNX file: its metadata is no text.")
    said = {
        key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)
    }
    if not said:
        raise ConfigError(
            f"{path} says nothing about where it came from.",
            hint="Only files that gauge-ext wrote do.",
        )
    return said
