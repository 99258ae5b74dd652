"""A folder of graphs that generate, and what belongs to them: configs, tokenizer, manifest."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext._version import __version__
from gauge_ext.export.disk.files import write_errors
from gauge_ext.export.metadata import append_metadata, summary
from gauge_ext.export.report import ExportReport, ValidationReport

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.export.language.loop import Generated
    from gauge_ext.export.precision.quantize_report import QuantizationReport

MANIFEST = "gauge_ext.json"
# What tokenizers and processors of transformers are made of. Weights and their index stay behind.
_CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "spm.*", "chat_template*", "preprocessor_config.json", "processor_config.json"),
    *("normalizer.json", "LICENSE*", "NOTICE*"),
)


def write_settings(
    model: nn.Module, folder: Path, source: Path | None, more: Mapping[str, Any] | None = None
) -> None:
    """Writes a model's configs into a folder, and copies its tokenizer or processor there.

    Args:
        model: A generating model of transformers.
        folder: Where to.
        source: The folder that the model was loaded from, or None.
        more: Name of a further file -> what to write into it as JSON.

    Raises:
        WriteError: the folder cannot be written.
    """
    held: Any = model
    config = copy.deepcopy(held.config)
    # Loading for a plain export switches the cache off; here it is what the graphs are about.
    config.use_cache = config.get_text_config().use_cache = True
    with write_errors(folder):
        config.save_pretrained(folder)
        if getattr(held, "generation_config", None) is not None:
            generation = copy.deepcopy(held.generation_config)
            generation.use_cache = True
            generation.save_pretrained(folder)
        if source is not None:
            for file in sorted({f for pattern in _CARRIED for f in source.glob(pattern)}):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        for name, value in (more or {}).items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def settle(
    report: ExportReport,
    draft: Path,
    validation: ValidationReport | None,
    whole: ValidationReport | None,
    lost: QuantizationReport | None,
    generated: tuple[Generated, ...] | None,
) -> ExportReport:
    """Writes what running a draft found into it, and into its report.

    Args:
        report: The report of a draft that was not validated as it was written.
        draft: The folder that the draft is in.
        validation: What was found about it in float32; None if it was not validated.
        whole: What was found about it together with others.
        lost: What fewer bits cost; None in float32. It stands in the file already.
        generated: What it wrote together with others.
    """
    file = draft / report.path.name
    said = {} if lost is None else lost.provenance
    more = {}
    if lost is None and validation is not None:
        more = summary(*(found for found in (validation, whole) if found is not None))
    if generated is not None:
        counts = {"tokens": sum(g.tokens for g in generated)}
        counts["agreed"] = sum(g.agreed for g in generated)
        more["generation"] = json.dumps({**counts, "against": "torch"})
    if more:
        append_metadata(file, more)
    parts = [p for p in draft.iterdir() if p == file or p.name.startswith(f"{file.name}.")]
    return replace(
        report,
        files=tuple(sorted(parts)),
        provenance={**report.provenance, **said, **more},
        bytes_written=sum(part.stat().st_size for part in parts),
        validation=validation,
        quantization=lost,
    )


def write_manifest(draft: Path, task: str, graphs: Iterable[ExportReport]) -> None:
    """Writes a folder's ``gauge_ext.json``: the hash of every file, and the origin of each graph.

    Raises:
        WriteError: it cannot be written.
    """
    with write_errors(draft):
        files = sorted(file for file in draft.iterdir() if file.is_file())
        manifest = {
            "version": __version__,
            "task": task,
            "files": {
                file.name: {"sha256": file_sha256(file), "bytes": file.stat().st_size}
                for file in files
            },
            "graphs": {graph.path.name: origin_of(graph.provenance) for graph in graphs},
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def origin_of(said: Mapping[str, str]) -> dict[str, str]:
    """What a manifest repeats of a graph's metadata: its precision, its base and its adapter."""
    origin = {"precision": said.get("precision", "fp32")}
    return origin | {key: said[key] for key in ("base_sha256", "adapter_sha256") if key in said}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
