"""Models that generate, for ``gauge-ext export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gauge_ext.cli.adapted import show
from gauge_ext.cli.console import working
from gauge_ext.cli.problems import OptionError, blame
from gauge_ext.errors import GaugeError, TargetError, ValidationError, WriteError

if TYPE_CHECKING:
    from torch import nn

    from gauge_ext.cli.base import Base

_OPTIONS = {WriteError: "--out", ValidationError: "--tolerance", TargetError: "--targets"}


def kind_of(model: nn.Module) -> str | None:
    """The task that a model is made for: ``text-generation``, ``seq2seq``, or None."""
    can_generate: Any = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return None
    config: Any = model.config
    return "seq2seq" if config.is_encoder_decoder else "text-generation"


def export_folder(
    base: Base, out: Path, task: str, report_file: Path | None, as_json: bool, **settings: Any
) -> None:
    """Write the graphs of a model that generates, with its tokenizer, and show the report.

    Args:
        base: The model with its adapter.
        out: The folder to write.
        task: ``text-generation``, ``seq2seq``, or ``auto`` for what the model is made for.
        report_file: Where to write the report as JSON, or None.
        as_json: Whether to print it as JSON.
        settings: Of :func:`gauge_ext.export.export_causal_lm`.
    """
    from gauge_ext.export import export_causal_lm, export_seq2seq
    from gauge_ext.export.language.calibration_prompts import CalibrationError
    from gauge_ext.export.validate import DisagreementError

    options: dict[type[GaugeError], str] = {CalibrationError: "--calibration", **_OPTIONS}
    chosen = kind_of(base.model) if task == "auto" else task
    write = export_seq2seq if chosen == "seq2seq" else export_causal_lm
    try:
        with working("exporting") as progress, blame("BASE", options):
            report = write(base.model, out, source=base.folder, progress=progress, **settings)
    except OptionError as error:
        if isinstance(error.__cause__, DisagreementError):
            show(error.__cause__.report, report_file, as_json)
        raise
    show(report, report_file, as_json)
