"""An adapter into the weights of a checkpoint on disk, in the memory of a few rows.

A merged weight has the shape and dtype of the base's, so a safetensors file keeps its header, and
its merged copy is a plain copy with other rows in some places: no shard is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gauge_ext._version import __version__
from gauge_ext.export.disk.base_folder import BaseFolder, open_base
from gauge_ext.export.disk.base_targets import Target, match_targets
from gauge_ext.export.disk.files import require_space
from gauge_ext.export.disk.numbers import BY_SAFETENSORS
from gauge_ext.export.disk.resume import resumable_folder
from gauge_ext.export.disk.spans import copy_span, opened
from gauge_ext.export.patching.update import Place, add_update
from gauge_ext.export.patching.updates import AdapterSource, Updates, open_updates

Progress = Callable[[str, float], None]  # what is being done, and the share that is done

PROVENANCE_NAME = "gauge_ext_merge.json"


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_checkpoint` wrote.

    Attributes:
        path: The folder.
        merged: Names of the tensors that changed.
        carried: How many tensors were copied as they were.
        files: Every file written.
        bytes_written: Their sizes, added up.
        adapter_sha256: The adapter's digest; several are joined by ``+``.
        skipped: Files of the base left behind: weights in other formats, which are not merged.
        resumed: Shards that an interrupted merge had finished before.
    """

    path: Path
    merged: tuple[str, ...]
    carried: int
    files: tuple[Path, ...]
    bytes_written: int
    adapter_sha256: str
    skipped: tuple[Path, ...] = ()
    resumed: tuple[Path, ...] = ()


def merge_checkpoint(
    base_dir: str | Path,
    adapter: AdapterSource,
    out_dir: str | Path,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes a merged copy of a model's folder: each adapted weight W becomes W + s·B·A.

    That goes for linear layers, embeddings and convolutions without groups; with DoRA the weight
    becomes m (W + s·B·A) / ‖W + s·B·A‖, output by output, and with ``lora_bias`` the bias b becomes
    b + s·lora_bias. An embedding that is stored once for itself and the output layer must have one
    adapter with it (``ensure_weight_tying``).

    The sum is taken in float32 (float64 for a float64 base) and rounded once to the dtype of W;
    several adapters are added up before. Tokenizer, config and all other tensors are carried along;
    ``gauge_ext_merge.json`` records which adapter went in. Nothing is left at ``out_dir`` unless
    all went well; what was finished before an interruption is kept in a hidden folder beside it,
    from which the same call goes on. It needs neither torch nor more memory than a few chunks of
    rows and the adapter's largest layer.

    Args:
        base_dir: A local transformers folder with safetensors weights, in one file or in shards.
        adapter: An adapter's folder in the PEFT format; or several, as pairs or a mapping of folder
            and weight, for W + Σ weight·s·B·A. One with DoRA shares no layer with another.
        out_dir: The folder to make; it must not exist, or be empty.
        progress: Called with what is being done and the share done, in [0, 1].

    Returns:
        What was written.

    Raises:
        ConfigError: the base is missing, damaged, quantized, or not in safetensors; or the adapter
            asks for mathematics that is not implemented.
        AdapterFormatError: the adapter is missing, damaged, or none.
        AdapterMismatchError: the adapter is for another model; says which keys or shapes.
        NonFiniteError: a weight, a factor or a merged weight holds NaN or infinity.
        WriteError: the folder cannot be written, or holds something.
    """
    out = Path(out_dir)
    updates = open_updates(adapter)
    base = open_base(Path(base_dir))
    targets = match_targets(
        base,
        updates.weights,
        updates.biases,
        may_lie_transposed=updates.transposes,
        tied=updates.tied,
    )
    updates.check_numbers()
    require_space(out, base.nbytes)
    resumed = []
    with resumable_folder(out, _job(base, updates)) as stage:
        for file in base.carried:
            (stage.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path / file, stage.folder / file)
        for index, shard in enumerate(base.shards):
            if progress is not None:
                progress(f"merging {shard}", index / len(base.shards))
            if stage.has(shard):
                resumed.append(shard)
                continue
            with stage.file(shard) as draft:
                _merge_shard(base.path / shard, draft, targets, updates)
        (stage.folder / PROVENANCE_NAME).write_text(_provenance(updates, targets))
        found = sorted(file for file in stage.folder.rglob("*") if file.is_file())
        written = [file.relative_to(stage.folder) for file in found]
        size = sum(file.stat().st_size for file in found)
    if progress is not None:
        progress("done", 1.0)
    return MergeReport(
        path=out,
        merged=tuple(targets),
        carried=len(base.tensors) - len(targets),
        files=tuple(out / file for file in written),
        bytes_written=size,
        adapter_sha256="+".join(adapter.sha256 for adapter in updates.adapters),
        skipped=base.skipped,
        resumed=tuple(resumed),
    )


def _merge_shard(
    source: Path, draft: Path, targets: Mapping[str, Target], updates: Updates
) -> None:
    """Copies a shard, with the merged weights in place of the base's."""
    here = {name: t for name, t in targets.items() if t.stored.span.path == source}
    ordered = sorted(here.items(), key=lambda item: item[1].stored.span)
    with opened(source) as reader, opened(draft, os.O_RDWR) as writer:
        size = os.fstat(reader).st_size
        os.truncate(writer, size)
        at = 0
        for _, target in ordered:
            span = target.stored.span
            copy_span(reader, at, span.offset - at, writer, at)
            at = span.end
        copy_span(reader, at, size - at, writer, at)
    for name, target in ordered:
        module = target.module
        update = updates.of_bias(module) if target.is_bias else updates.of(module)
        span = target.stored.span
        add_update(
            name,
            span,
            BY_SAFETENSORS[target.stored.dtype],
            update.transposed if target.transposed else update,
            Place(draft, span.offset),
        )


def _job(base: BaseFolder, updates: Updates) -> str:
    """What makes a merge the same: the base's files, by size and date, and the adapters."""
    digest = hashlib.sha256(__version__.encode())
    for file in (*base.shards, *base.carried):
        found = (base.path / file).stat()
        digest.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    for adapter in updates.adapters:
        digest.update(f"{adapter.sha256}\0{adapter.weight.hex()}\0".encode())
    return digest.hexdigest()


def _provenance(updates: Updates, targets: Mapping[str, Target]) -> str:
    said = {
        "version": __version__,
        "adapter_sha256": "+".join(adapter.sha256 for adapter in updates.adapters),
        "merged": {name: updates.describe(target.module) for name, target in targets.items()},
    }
    return json.dumps(said, indent=2) + "\n"
