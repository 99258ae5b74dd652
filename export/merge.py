"""An adapter into the weights of a checkpoint on disk, in the memory of a few rows.

A merged weight has the shape and dtype of the base's, so a safetensors file keeps its header, and
its merged copy is a plain copy with some rows written over: no shard is ever in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gauge_ext._version import __version__
from gauge_ext.checkpoint import AdapterCheckpoint, LoRAPair, read_adapter
from gauge_ext.errors import NonFiniteError
from gauge_ext.export.base_folder import (
    FLOATS,
    BaseFolder,
    Stored,
    is_transposed,
    match_targets,
    open_base,
)
from gauge_ext.export.files import require_space, staged_folder

Progress = Callable[[str, float], None]  # what is being done, and the share that is done

PROVENANCE_NAME = "gauge_ext_merge.json"
_BLOCK_BYTES = 2**23  # of one block of rows in float32: fits the caches, and keeps GEMM efficient


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_checkpoint` wrote.

    Attributes:
        path: The folder.
        merged: Names of the tensors that changed.
        carried: How many tensors were copied as they were.
        files: Every file written.
        bytes_written: Their sizes, added up.
        adapter_sha256: The adapter's digest.
        skipped: Files of the base left behind: weights in other formats, which are not merged.
    """

    path: Path
    merged: tuple[str, ...]
    carried: int
    files: tuple[Path, ...]
    bytes_written: int
    adapter_sha256: str
    skipped: tuple[Path, ...] = ()


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes a merged copy of a model's folder: each adapted weight W becomes W + s·B·A.

    The sum is taken in float32 (float64 for a float64 base) and rounded once to the dtype of W.
    Tokenizer, config and all other tensors are carried along; ``gauge_ext_merge.json`` records
    which adapter went in. Nothing is left at ``out_dir`` unless all went well.

    Args:
        base_dir: A local transformers folder with safetensors weights, in one file or in shards.
        adapter_dir: An adapter in the PEFT format.
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
    adapter = read_adapter(adapter_dir)
    base = open_base(Path(base_dir))
    targets = match_targets(base, adapter)
    require_space(out, base.nbytes)
    shards = sorted({stored.file for stored in base.tensors.values()})
    with staged_folder(out) as folder:
        for file in base.carried:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path / file, folder / file)
        for index, shard in enumerate(shards):
            if progress is not None:
                progress(f"merging {shard}", index / len(shards))
            (folder / shard).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path / shard, folder / shard)
            for name, module in targets.items():
                stored = base.tensors[name]
                if stored.file == shard:
                    scaling = adapter.config.scaling_for(module)
                    pair = adapter.tensors[module]
                    if is_transposed(stored, adapter, module):  # W + (s B A)ᵀ
                        pair = LoRAPair(pair.lora_B.mT, pair.lora_A.mT)
                    _merge_tensor(base, folder, name, stored, pair, scaling)
        (folder / PROVENANCE_NAME).write_text(_provenance(adapter, targets))
        written = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
        size = sum((folder / file).stat().st_size for file in written)
    if progress is not None:
        progress("done", 1.0)
    return MergeReport(
        path=out,
        merged=tuple(targets),
        carried=len(base.tensors) - len(targets),
        files=tuple(out / file for file in written),
        bytes_written=size,
        adapter_sha256=adapter.sha256,
        skipped=base.skipped,
    )


def _merge_tensor(
    base: BaseFolder, folder: Path, name: str, stored: Stored, pair: LoRAPair, scaling: float
) -> None:
    """Writes ``W + scaling * lora_B @ lora_A`` over the copy of W, block of rows by block."""
    rows, columns = stored.shape
    dtype = FLOATS[stored.dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lora_A, lora_B = pair.lora_A.to(wide), pair.lora_B.to(wide)
    step = max(1, _BLOCK_BYTES // (4 * columns))
    with (base.path / stored.file).open("rb") as source, (folder / stored.file).open("r+b") as out:
        source.seek(stored.offset)
        out.seek(stored.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = bytearray(source.read(count * columns * dtype.itemsize))
            weight = torch.frombuffer(raw, dtype=dtype).view(count, columns)
            delta = torch.mm(lora_B[start : start + count], lora_A).mul_(scaling)
            merged = delta.add_(weight).to(dtype)
            if not bool(merged.isfinite().all()):
                which = (
                    "holds NaN or infinity"
                    if not weight.isfinite().all()
                    else (f"plus its update exceeds the range of {dtype}")
                )
                raise NonFiniteError(f"{name} {which}.", hint="Nothing was written.")
            out.write(merged.view(torch.uint8).numpy().data)


def _provenance(adapter: AdapterCheckpoint, targets: dict[str, str]) -> str:
    merged = {
        name: {
            "rank": adapter.tensors[module].lora_A.shape[0],
            "scaling": adapter.config.scaling_for(module),
        }
        for name, module in targets.items()
    }
    said = {"version": __version__, "adapter_sha256": adapter.sha256, "merged": merged}
    return json.dumps(said, indent=2) + "\n"
