"""An adapter into the weights of an ONNX model that exists already, without torch.

The graph stays as it is, byte for byte. Each weight that the adapter changes is read some rows at a
time, changed, and written to its place in the copy; everything else is copied by the kernel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gauge_ext._version import __version__
from gauge_ext.errors import ConfigError
from gauge_ext.export.disk.base_folder import open_base
from gauge_ext.export.disk.files import data_name, require_space, staged_files, write_errors
from gauge_ext.export.disk.numbers import BY_ONNX
from gauge_ext.export.disk.onnx_copy import Copy
from gauge_ext.export.disk.onnx_file import OnnxFile, StoredTensor, open_onnx
from gauge_ext.export.patching.homes import Home, find_homes
from gauge_ext.export.patching.nbits import Loss, quantized_weight, requantize
from gauge_ext.export.patching.update import add_update
from gauge_ext.export.patching.updates import AdapterSource, Updates, open_updates

Progress = Callable[[str, float], None]

PATCHED_KEY = "gauge_ext.patched"


@dataclass(frozen=True)
class PatchedWeight:
    """One weight that changed.

    Attributes:
        module: Path of the module that the adapter is for.
        tensor: The initializer.
        found_by: What it was recognised by.
        layout: ``(out, in)``, ``(in, out)``, ``(out, in, kernel)``, or how it is quantized.
        rank: Rank of the update; a list where several adapters share it.
        scaling: Its scaling, likewise.
        loss: What rounding to codes cost; None where the weight is in floating point.
    """

    module: str
    tensor: str
    found_by: str
    layout: str
    rank: int | list[int]
    scaling: float | list[float]
    loss: Loss | None = None


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_onnx` wrote.

    Attributes:
        path: The model.
        files: All files: the model, and that of its weights where they are outside.
        bytes_written: Their sizes, added up.
        adapter_sha256: The adapter's digest; several are joined by ``+``.
        weights: What changed.
        difference: Largest difference to the base with the update added by hand, in onnxruntime,
            relative to the largest output; None where that was not asked for.
    """

    path: Path
    files: tuple[Path, ...]
    bytes_written: int
    adapter_sha256: str
    weights: tuple[PatchedWeight, ...]
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        return {
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "bytes_written": self.bytes_written,
            "adapter_sha256": self.adapter_sha256,
            "difference": self.difference,
            "weights": [
                {
                    **{key: value for key, value in vars(weight).items() if key != "loss"},
                    "loss": None if weight.loss is None else vars(weight.loss),
                }
                for weight in self.weights
            ],
        }


def patch_onnx(
    base: str | Path,
    adapter: AdapterSource,
    out: str | Path,
    *,
    base_weights: str | Path | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> PatchReport:
    """Writes a copy of an ONNX model in which each adapted weight W is W + s·B·A.

    That goes for linear layers, embeddings and convolutions without groups; with DoRA the weight
    becomes m (W + s·B·A) / ‖W + s·B·A‖, output by output.

    Which initializer belongs to which module is told by gauge_ext's own metadata, the optimizer's
    ``folded_from``, the initializer's name, the exporter's ``name_scopes`` or the node's name; with
    ``base_weights`` also by the values; and at last by shape and order where that is unequivocal.
    It may lie ``(out, in)`` or ``(in, out)``, in float64, float32, float16 or bfloat16, or be in
    4-bit or 8-bit blocks (``MatMulNBits``), which are encoded again; the loss is in the report.
    Sums are taken in float32 (float64 for float64) and rounded once.

    Memory: some chunks of rows, the largest layer of the adapter, and the graph without its
    weights, wherever these are. Needs onnx and numpy, not torch.

    Args:
        base: The .onnx file; its weights may be inside or in files beside it.
        adapter: An adapter's folder in the PEFT format; or several, as pairs or a mapping of folder
            and weight, for W + Σ weight·s·B·A.
        out: The file to write, replaced at the very end or left untouched. Weights outside the base
            go to one file beside it.
        base_weights: The folder of the model that the base was exported from. Every weight found is
            then compared with it, and those not found are looked for by their values.
        verify: Run the result in onnxruntime against the base's graph with W + s·B·A fed to it,
            before it is put in place; loads the model twice.
        progress: Called with what is being done and the share done, in [0, 1].

    Returns:
        What was written.

    Raises:
        ConfigError: the base is missing, damaged or dangerous; or the adapter asks for mathematics
            that is not implemented; or out is base.
        AdapterFormatError: the adapter is missing, damaged, or none.
        AdapterMismatchError: a module has no unique home in the graph; says which and what was
            tried.
        NonFiniteError: a weight, a factor or a sum holds NaN or infinity.
        ValidationError: onnxruntime disagrees.
        ExportError: a package is missing.
        WriteError: the target cannot be written.
    """
    out = Path(out)
    updates = open_updates(adapter)
    file = open_onnx(base)
    if os.path.realpath(out) == os.path.realpath(file.path):
        raise ConfigError(f"out is the base itself, {out}.", hint="Choose another name.")
    folder = open_base(Path(base_weights)) if base_weights is not None else None
    if updates.biases:
        raise ConfigError(
            f"the adapter changes the bias of {updates.biases[0]!r} (lora_bias), and an ONNX graph "
            "does not say which constant that is.",
            hint="Merge into the checkpoint (gauge-ext merge) and export that.",
        )
    homes = find_homes(file, updates.weights, folder)
    jobs = [_Job(file, home) for home in homes]
    updates.check_numbers()
    require_space(out, file.nbytes)
    metadata = {PATCHED_KEY: _provenance(file, updates, homes)}
    with staged_files(out) as stage:
        draft = stage / out.name
        with write_errors(out):
            changed = [part for job in jobs for part in job.parts]
            copy = Copy(file, draft, stage / data_name(out), changed, metadata)
            copy.write()
        weights = []
        for index, job in enumerate(jobs):
            if progress is not None:
                progress(f"patching {job.home.module}", index / len(jobs))
            with write_errors(out):
                weights.append(job.run(copy, updates))
        difference = None
        if verify:
            from gauge_ext.export.patching.verify_patch import verify_patch

            if progress is not None:
                progress("verifying in onnxruntime", 1.0)
            difference = verify_patch(file, draft, homes, updates)
        written = sorted(stage.iterdir())
        size = sum(path.stat().st_size for path in written)
    if progress is not None:
        progress("done", 1.0)
    return PatchReport(
        path=out,
        files=tuple(out.with_name(path.name) for path in written),
        bytes_written=size,
        adapter_sha256="+".join(adapter.sha256 for adapter in updates.adapters),
        weights=tuple(weights),
        difference=difference,
    )


@dataclass
class _Job:
    """One weight to change.

    Attributes:
        file: The base.
        home: Which.
        parts: The tensors that are written anew.
    """

    file: OnnxFile
    home: Home
    parts: list[StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        site = self.home.site
        if site.blocks is not None:
            self.parts = quantized_weight(self.file, site).parts
        else:
            self.parts = [self.file.initializers[site.tensor]]
            if self.parts[0].data_type not in BY_ONNX:
                raise ConfigError(
                    f"{site.tensor!r} in {self.file.path}, the weight of {self.home.module!r}, is "
                    f"of type {self.parts[0].data_type} (TensorProto.DataType), and an update can "
                    "be added to floating-point numbers and MatMulNBits blocks only.",
                    hint="Patch the model before it is quantized.",
                )
        for part in self.parts:
            if part.span is None:
                raise ConfigError(
                    f"{part.name!r} in {self.file.path} is not stored as plain numbers (raw_data), "
                    "so its place cannot be written anew.",
                    hint="For that tensor t of the model: t.CopyFrom(onnx.numpy_helper.from_array("
                    "onnx.numpy_helper.to_array(t), t.name)), and save it.",
                )

    def run(self, copy: Copy, updates: Updates) -> PatchedWeight:
        """Reads, changes and writes it."""
        site, module = self.home.site, self.home.module
        update, said = updates.of(module), updates.describe(module)
        places = [copy.place(part) for part in self.parts]
        loss = None
        if site.blocks is not None:
            loss = requantize(site.tensor, quantized_weight(self.file, site), update, places)
            layout = f"(out, in) in {site.blocks.bits}-bit blocks of {site.blocks.size}"
        else:
            span = self.parts[0].span
            assert span is not None
            stored = update.transposed if site.transposed else update
            add_update(site.tensor, span, BY_ONNX[self.parts[0].data_type], stored, places[0])
            layout = "(in, out)" if site.transposed else "(out, in)"
            if site.kind == "convolution":
                layout = "(out, in, kernel)"
        return PatchedWeight(
            module, site.tensor, self.home.found_by, layout, said["rank"], said["scaling"], loss
        )


def _provenance(file: OnnxFile, updates: Updates, homes: Iterable[Home]) -> str:
    """What was added to the base, after what the base itself says was added to it before."""
    try:
        before = json.loads(file.metadata.get(PATCHED_KEY, "[]"))
    except ValueError:
        before = []
    said = {
        "version": __version__,
        "adapter_sha256": [adapter.sha256 for adapter in updates.adapters],
        "weights": {home.site.tensor: updates.describe(home.module) for home in homes},
    }
    return json.dumps([*(before if isinstance(before, list) else [before]), said])
