"""An adapter as a file that fits one graph: ``.onnx_adapter`` for onnxruntime, or safetensors.

onnxruntime loads ``.onnx_adapter`` beside the graph. A runtime without that (onnxruntime-web and
-node, OpenVINO) is fed the tensors of the safetensors file, which has the same names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext._version import __version__
from gauge_ext.errors import AdapterMismatchError, ConfigError
from gauge_ext.export.adapters.declared import model_table
from gauge_ext.export.adapters.gauges import GAUGES, AdapterGauge, Factors, choose_gauge
from gauge_ext.export.adapters.read import PREFIX, SUFFIX, TENSORS, VERSION_KEY
from gauge_ext.export.adapters.table import AdapterTable, Arrays
from gauge_ext.export.checks import require_packages
from gauge_ext.export.disk.files import require_space, staged_files, write_errors

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.checkpoint import AdapterCheckpoint


@dataclass(frozen=True)
class AdapterFileReport:
    """What :func:`write_onnx_adapter` wrote.

    Attributes:
        path: The file.
        bytes_written: Its size.
        precision: How the graph stores factors.
        ranks: Path of the module in the graph -> rank.
        gauges: Path of the module -> the gauge that its factors are stored in.
        losses: Gauge that was measured -> path of the module -> ``||X' - X|| / ||X||`` in the
            Frobenius norm, X = scaling * B A before and X' after storing.
        missing: Modules of the graph that the adapter leaves as they are.
        adapter_sha256: See :func:`gauge_ext.checkpoint.adapter_digest`.
    """

    path: Path
    bytes_written: int
    precision: str
    ranks: dict[str, int]
    gauges: dict[str, str]
    losses: dict[str, dict[str, float]]
    missing: tuple[str, ...]
    adapter_sha256: str

    @property
    def loss(self) -> float:
        """The root mean square over modules of the loss in the gauge that was written."""
        chosen = [self.losses[gauge][name] for name, gauge in self.gauges.items()]
        return float(np.sqrt(np.mean(np.square(chosen))))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        means = {
            gauge: _finite(float(np.sqrt(np.mean(np.square(list(found.values()))))))
            for gauge, found in self.losses.items()
        }
        return {
            "path": str(self.path),
            "bytes_written": self.bytes_written,
            "precision": self.precision,
            "adapter_sha256": self.adapter_sha256,
            "loss": self.loss,
            "loss_by_gauge": means,
            "layers": [
                {
                    "name": name,
                    "rank": rank,
                    "gauge": self.gauges[name],
                    "losses": {g: _finite(found[name]) for g, found in self.losses.items()},
                }
                for name, rank in self.ranks.items()
            ],
            "missing": list(self.missing),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def write_onnx_adapter(
    adapter: nn.Module | AdapterCheckpoint | str | os.PathLike[str],
    graph: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    gauge: AdapterGauge = "trained",
) -> AdapterFileReport:
    """Writes an adapter as the file that fits a graph exported with ``mode="adapters"``.

    The ``.safetensors`` form says where it came from: the hashes of adapter and base, precision,
    gauge of each layer, and what every gauge that was measured would have lost. An
    ``.onnx_adapter`` has room for two numbers, of the adapter and of the graph. ``gauge-ext
    provenance`` reads both.

    Names, layout, precision and scaling (alpha / r, or alpha / sqrt(r) with rsLoRA, with
    ``alpha_pattern`` and ``rank_pattern``) become those of the graph. Layers of the graph that the
    adapter does not have stay the base's.

    Args:
        adapter: A model with adapters, a saved adapter, or its folder in PEFT's format.
        graph: The ONNX file.
        path: The file to write; ``.onnx_adapter``, or ``.safetensors`` for other runtimes.
        gauge: Which of the factors with the same update to store: those of the training, those of
            a gauge of :func:`gauge_ext.geometry.to_gauge`, or ``"auto"``: for each layer the one
            that loses least in the graph's precision, by measuring all three.

    Returns:
        What was written, and what rounding cost.

    Raises:
        ConfigError: the graph has no adapter inputs, the suffix or gauge is unknown, or the
            adapter asks for mathematics that is not implemented, such as DoRA.
        AdapterFormatError: the adapter is missing, damaged, or none.
        AdapterMismatchError: the adapter has modules for which the graph has no inputs, or of
            other shapes.
        NonFiniteError: a factor holds NaN or infinity, or exceeds float16.
        WriteError: the file cannot be written; nothing is left there.
    """
    target = Path(path)
    if gauge not in GAUGES:
        raise ConfigError(f"gauge must be one of {', '.join(GAUGES)}, got {gauge!r}.")
    if target.suffix not in {SUFFIX, TENSORS}:
        raise ConfigError(
            f"path must end in {SUFFIX} (onnxruntime) or {TENSORS} (other runtimes), got "
            f"{target.name!r}."
        )
    require_packages("onnx", *(["onnxruntime"] if target.suffix == SUFFIX else []))
    table = read_table(Path(graph))
    factors, digest, what = effective_factors(adapter)
    # Before any gauge is measured: what does not fit needs none.
    prefix = table.place(factors, what)
    factors = {name: pair for name, pair in factors.items() if prefix + name in table.inputs}
    if not factors:
        raise AdapterMismatchError(
            f"{what} has no factors for {Path(graph).name}: its layers are all in another graph.",
            hint="Write it for the other graph of the folder; this one needs no file.",
        )
    factors, gauges, losses = choose_gauge(factors, table, gauge)
    arrays = table.pack(factors, what)
    require_space(target, sum(array.nbytes for array in arrays.values()))
    named = {name: prefix + name for name in factors}
    report = AdapterFileReport(
        path=target,
        bytes_written=0,
        precision=table.precision,
        ranks={named[name]: a.shape[0] for name, (a, _) in factors.items()},
        gauges={named[name]: found for name, found in gauges.items()},
        losses={g: {named[n]: x for n, x in found.items()} for g, found in losses.items()},
        missing=tuple(name for name in table.inputs if name not in named.values()),
        adapter_sha256=digest,
    )
    with staged_files(target) as folder, write_errors(target):
        _write(folder / target.name, arrays, table, report, gauge)
        size = (folder / target.name).stat().st_size
    return replace(report, bytes_written=size)


def read_table(graph: Path) -> AdapterTable:
    """Reads the table of a graph's adapter inputs; its weights are not touched.

    Raises:
        ConfigError: there is no such file, it is no ONNX file, or it has no adapter inputs.
    """
    table = find_table(graph)
    if table is None:
        raise ConfigError(
            f"{graph} has no adapter inputs.",
            hint="Export it with mode='adapters' (gauge-ext export --mode adapters).",
        )
    return table


def find_table(graph: Path) -> AdapterTable | None:
    """The table of a graph's adapter inputs, or None where it has none.

    Raises:
        ConfigError: there is no such file, or it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not graph.is_file():
        raise ConfigError(f"there is no file {graph}.", hint="Give the path of an ONNX file.")
    try:
        model = onnx.load(str(graph), format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{graph} is not a whole ONNX file: {error}.") from error
    return model_table(model)


def effective_factors(
    adapter: nn.Module | AdapterCheckpoint | str | os.PathLike[str],
) -> tuple[Factors, str, str]:
    """The factors of an adapter with the scaling in lora_B, its digest, and its name.

    The product with the scaling is taken in float64 and rounded to float32 (float64 stays).
    """
    from gauge_ext.checkpoint import AdapterCheckpoint, adapter_sha256, read_adapter
    from gauge_ext.checkpoint.on_model import adapter_parts
    from gauge_ext.models import whole_parameters

    if isinstance(adapter, str | os.PathLike):
        adapter = read_adapter(adapter)
    if isinstance(adapter, AdapterCheckpoint):
        for name, pair in adapter.tensors.items():
            _require_plain(name, vars(pair))
        if whole := getattr(adapter, "whole", None):
            raise _no_pair(next(iter(whole)), "a weight that was trained whole")
        factors = {
            name: _scaled(pair.lora_A, pair.lora_B, adapter.config.scaling_for(name))
            for name, pair in adapter.tensors.items()
        }
        return factors, adapter.sha256, str(adapter.path)
    chosen, parts = adapter_parts(adapter, None, "written")
    for path, part in parts.items():
        started = {"lora_A0": part.rank} if part.pair.rank != part.rank else {}
        _require_plain(path, {**vars(part.pair), **started})
    factors = {
        path: _scaled(part.pair.lora_A, part.pair.lora_B, part.scaling)
        for path, part in parts.items()
    }
    if whole := whole_parameters(adapter, chosen):
        raise _no_pair(next(iter(whole)), "a weight that was trained whole")
    digest = adapter_sha256(adapter, chosen)
    return factors, digest, f"the adapter on this {type(adapter).__name__}"


def _require_plain(name: str, parts: Mapping[str, Any]) -> None:
    """Refuses an adapter that is more than two matrices."""
    for key, part in parts.items():
        if key not in {"lora_A", "lora_B", "kind"} and part is not None:
            raise _no_pair(name, f"{key} beside its factors")
    if parts.get("kind", "linear") != "linear" or parts["lora_A"].dim() != 2:
        raise _no_pair(name, "factors that are no matrices of a linear layer")


def _no_pair(name: str, what: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"the adapter has {what} at {name!r} (such as DoRA, an embedding, a convolution or a "
        "trained bias), which inputs for two factors cannot carry.",
        hint="Merge it: export with mode='merged'.",
    )


def _scaled(lora_A: Any, lora_B: Any, scaling: float) -> tuple[NDArray[Any], NDArray[Any]]:
    a = lora_A.detach().cpu().double().numpy()
    b = lora_B.detach().cpu().double().numpy() * scaling
    wide = "float64" if "float64" in str(lora_A.dtype) else "float32"
    return a.astype(wide), b.astype(wide)


def _finite(loss: float) -> float | None:
    """JSON has no infinity, which is what a gauge beyond float16 loses."""
    return loss if math.isfinite(loss) else None


def adapter_number(digest: str) -> int:
    """31 bits of an adapter's SHA-256: an ``.onnx_adapter`` file has room for one number of it."""
    return int(digest[:8], 16) >> 1


def _write(
    file: Path, arrays: Arrays, table: AdapterTable, report: AdapterFileReport, gauge: AdapterGauge
) -> None:
    if file.suffix == TENSORS:
        import safetensors.numpy

        said = {
            "format": "np",
            f"{PREFIX}version": __version__,
            f"{PREFIX}adapter_sha256": report.adapter_sha256,
            f"{PREFIX}base_sha256": table.base,
            VERSION_KEY: str(table.version),
            f"{PREFIX}precision": table.precision,
            f"{PREFIX}gauge": gauge,
            f"{PREFIX}gauges": json.dumps(report.gauges),
            f"{PREFIX}loss": json.dumps(report.to_dict()["loss_by_gauge"]),
        }
        file.write_bytes(safetensors.numpy.save(arrays, metadata=said))
        return
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(adapter_number(report.adapter_sha256))
    adapter.set_model_version(table.version)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()
    }
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(file))
    except RuntimeError as error:  # what it raises where the system refuses a write
        raise OSError(f"onnxruntime: {str(error).rpartition(') ')[2]}") from error
