"""Where an ONNX file came from, written into the file itself.

Every key starts with ``gauge_ext.``; every value is text, JSON where it holds structure. Nothing in
it depends on the time, the machine or the path, so the same model gives the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gauge_ext._version import __version__
from gauge_ext.adapters import WrappedAdapter
from gauge_ext.adapters.quantized import is_encoded
from gauge_ext.adapters.slot import AdapterSlot
from gauge_ext.adapters.whole import whole_modules
from gauge_ext.checkpoint import adapter_sha256
from gauge_ext.checkpoint.on_model import adapter_parts
from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.files import write_errors
from gauge_ext.export.trace.inputs import Bounds
from gauge_ext.models import (
    adapter_names,
    adapters,
    attached_modules,
    attachment,
    lora_layers,
)
from gauge_ext.models.roster import active_pairs

if TYPE_CHECKING:
    from gauge_ext.export.report import ValidationReport
    from gauge_ext.export.trace.graph import Graph

PREFIX = "gauge_ext."
_WRAPPED_BASE = "base_model."
_LATER = frozenset({"parameters", "dynamic_dims", "validation", "precision", "generation"})


def provenance(model: nn.Module, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What there is to say about a model before it is merged.

    Args:
        model: The caller's model, with or without adapters, merged or not.
        extra: More to say; keys without the prefix, text as values.

    Returns:
        Key without prefix -> text:

        - ``version``, ``torch_version``, ``onnxscript_version``
        - ``base_sha256``: :func:`base_sha256`; not where the base is lost
        - ``adapter_sha256``: as :func:`gauge_ext.checkpoint.adapter_sha256`; only with an adapter.
          Of several adapters those that work, joined by ``+``
        - ``adapted_layers``: JSON, path -> {"rank", "scaling"}, in lists where there are several
          adapters; only with an adapter

    No gauge is among them: ``W + scaling * lora_B @ lora_A`` is the same in each, and a graph with
    inputs for adapters holds none. The file of an adapter says ``gauges``, for each layer.

    Raises:
        ConfigError: a key of ``extra`` is one of these, or something is not text.
    """
    said = {
        "version": __version__,
        "torch_version": torch.__version__,
        "onnxscript_version": importlib.metadata.version("onnxscript"),
    }
    base = base_sha256(model)
    if base is not None:
        said["base_sha256"] = base
    if adapters(model):
        said |= _of_adapters(model)
    for key, value in (extra or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"provenance must map text to text, got {key!r}: {value!r}.")
        if key in said or key in _LATER:
            raise ConfigError(f"provenance: {key!r} is written by gauge_ext itself.")
        said[key] = value
    return said


def _of_adapters(model: nn.Module) -> dict[str, str]:
    """Digest, ranks and scalings of the adapters that work."""
    owners = attached_modules(model)
    owner = owners[0] if len(owners) == 1 else model
    active = active_pairs(owner)
    if len(adapter_names(owner) if owners else ()) < 2:
        layers = {
            name: {"rank": layer.rank, "scaling": layer.scaling}
            for name, layer in adapters(model).items()
        }
        return {"adapter_sha256": adapter_sha256(model), "adapted_layers": json.dumps(layers)}
    several: dict[str, dict[str, list[float]]] = {}
    for name, weight in active:
        for path, part in adapter_parts(owner, name, "exported")[1].items():
            said = several.setdefault(path, {"rank": [], "scaling": []})
            said["rank"].append(part.rank)
            said["scaling"].append(weight * part.scaling)
    return {
        "adapter_sha256": "+".join(adapter_sha256(model, name) for name, _ in active),
        "adapted_layers": json.dumps(several),
    }


def annotate(graph: Graph, said: Mapping[str, str]) -> dict[str, str]:
    """Writes the provenance into a graph, with two entries about the graph itself.

    ``parameters`` (JSON) maps every initializer that is a parameter to the parameter's names: its
    own name, and those of the parameters tied to it. ``dynamic_dims`` (JSON) maps a dynamic
    dimension to its least and largest size, null where there is no limit.

    Returns:
        Everything that was written, keys without prefix.
    """
    written = {
        **said,
        "parameters": json.dumps({name: list(names) for name, names in graph.parameters.items()}),
        "dynamic_dims": json.dumps({name: list(limits) for name, limits in graph.bounds.items()}),
    }
    for key, value in written.items():
        graph.model.metadata_props[PREFIX + key] = value
    return written


def append_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Adds metadata to a file that is written already, without reading it.

    Two protobuf messages one after the other are one message, and its lists are the lists of both
    (Protocol Buffers, "Encoding: Last One Wins"). So the size of the file does not matter.

    Args:
        path: The ONNX file; external data is not touched.
        entries: Keys without the prefix, and their text.

    Raises:
        WriteError: the file cannot be written.
    """
    import onnx

    more = onnx.ModelProto()
    for key, value in entries.items():
        more.metadata_props.add(key=PREFIX + key, value=value)
    with write_errors(path), path.open("ab") as file:
        file.write(more.SerializeToString())


def summary(*reports: ValidationReport, against: str = "torch") -> dict[str, str]:
    """What running a graph found, as metadata: ``validation``, JSON.

    It holds runtime, cases, max_abs, rounded to one digit, and ``against``, what the graph was
    compared with: ``torch``, or ``float32`` for a graph in fewer bits, which is compared with the
    float32 graph that it was made from.
    """
    found = {
        "runtime": reports[0].runtime,
        "cases": sum(len(report.cases) for report in reports),
        "max_abs": f"{max(report.max_abs for report in reports):.0e}",
        "against": against,
    }
    return {"validation": json.dumps(found)}


def read_bounds(metadata: Mapping[str, str]) -> Bounds:
    """The sizes that ``dynamic_dims`` allows; empty where a file says nothing about it."""
    try:
        found = json.loads(metadata.get(PREFIX + "dynamic_dims", "{}"))
        return {
            str(name): (int(low), None if high is None else int(high))
            for name, (low, high) in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the metadata {PREFIX}dynamic_dims is not what gauge_ext writes: {error}."
        ) from error


def base_sha256(model: nn.Module) -> str | None:
    """The SHA-256 of a model's state dict without adapters, in hexadecimal.

    It covers names, dtypes, shapes and bytes (of a weight in few bits: those of its numbers, as its
    library decodes them), sorted by name: those that the plain model has, also where a
    :class:`~gauge_ext.adapters.WrappedAdapter` stands in a layer's place. Merged layers count with
    the weight they had before; None where a layer did not keep it (``merge(keep_base=False)``).
    """
    layers = lora_layers(model)
    attached = attached_modules(model)
    # Adapters that hold their base as a submodule: what is theirs, and what is the base's.
    wrapped = [
        f"{p}." if p else "" for p, m in model.named_modules() if isinstance(m, WrappedAdapter)
    ]
    slots = {path for path, m in model.named_modules() if type(m) is AdapterSlot}
    tensors: dict[str, Tensor] = {}
    own = {
        f"{path}.{name}" if path else name: base
        for path, owner in model.named_modules()
        for name, base in (attachment(owner).whole if owner in attached else {}).items()
    }
    for path, module in whole_modules(model).items():
        own |= {f"{path}.{name}": base for name, base in module.own_parameters.items()}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = key
        prefix = next((prefix for prefix in wrapped if key.startswith(prefix)), None)
        if prefix is not None:
            inner = key.removeprefix(prefix)
            if not inner.startswith(_WRAPPED_BASE):
                continue
            name = prefix + inner.removeprefix(_WRAPPED_BASE)
        path, _, last = name.rpartition(".")
        if path in slots:
            continue
        layer = layers.get(path)
        if layer is not None and last in layer.own_names():
            continue
        if key in own:
            tensors[name] = own[key]
            continue
        if layer is not None and layer.merged and not layer.can_unmerge:
            return None
        if layer is not None and last in layer.kept_parameters:
            tensors[name] = layer.kept_parameters[last]
        elif isinstance(tensor, Tensor):  # and not what a get_extra_state() added
            tensors[name] = tensor
    return _digest(tensors.items())


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if is_encoded(tensor):  # its library keeps the codes where no view can reach them
            tensor = tensor.dequantize()
        # Any dtype is bytes to numpy; a 0-dim tensor cannot be viewed as such.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
