"""A graph that generates, in fewer bits: which inputs its outputs are compared on."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

from gauge_ext.export.adapters.declared import session_table
from gauge_ext.export.adapters.feeds import feeds_by_case
from gauge_ext.export.adapters.table import Arrays
from gauge_ext.export.language.calibration import Calibration
from gauge_ext.export.metadata import read_bounds
from gauge_ext.export.precision.quantize import Cases, quantize_in_place
from gauge_ext.export.precision.quantize_methods import Precision, QuantizationOptions
from gauge_ext.export.precision.quantize_report import QuantizationReport
from gauge_ext.export.proof.subject import Subject
from gauge_ext.export.session import open_session
from gauge_ext.export.tolerance import Tolerance
from gauge_ext.export.trace.cases import make_cases
from gauge_ext.export.trace.inputs import bind_inputs
from gauge_ext.export.validate import match_inputs

NO_BAR = Tolerance(relative=1e300, cosine=-1.0, top1=0.0)  # what is measured and not judged


def quantize_graph(
    subject: Subject,
    folder: Path,
    precision: Precision,
    options: QuantizationOptions,
    seed: int,
    calibration: Calibration | None = None,
) -> QuantizationReport:
    """Puts a draft in fewer bits, and compares it with float32 on the cases of its validation.

    Args:
        subject: The draft and the module that it equals.
        folder: Where the file will be.
        precision: How.
        options: See :class:`~gauge_ext.export.QuantizationOptions`.
        seed: Of the inputs.
        calibration: For int8-static: what gives the ranges, in place of ``options.calibration``.
            The first prompt is among what the outputs are compared on.
    """
    path = subject.path
    metadata = (session := open_session(path)[0]).get_modelmeta().custom_metadata_map
    table = session_table(session)
    more: dict[str, Arrays] = {"": {}}
    if table is not None:
        more = feeds_by_case(table, subject.module)
    example = bind_inputs(subject.module, subject.example)
    shapes, names = match_inputs(session, example, {} if table is None else table.shapes)
    del session
    cases = make_cases(
        subject.module,
        example,
        shapes,
        bounds=read_bounds(metadata),
        random_cases=subject.random_cases,
        seed=seed,
        make_inputs=subject.make_inputs,
        plans=subject.cases,
    )
    feeds: Cases = (
        (
            case.name + suffix,
            case.sizes,
            {**dict(zip(names, case.arrays, strict=True)), **arrays},
        )
        for case in cases
        for suffix, arrays in more.items()
    )
    place = folder / path.name
    if calibration is not None:
        options = replace(options, calibration=calibration.feeds(path.name))
        feeds = chain(feeds, calibration.cases(path.name))
    return quantize_in_place(path, place, precision, options, feeds, subject.focus)
