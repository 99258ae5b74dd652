"""A proof as one HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gauge_ext.html import Bar, Html, bars, element, facts, page, paragraph, section, table, verdict

if TYPE_CHECKING:
    from gauge_ext.export.proof.prove import Proof
    from gauge_ext.export.report import CaseResult, OutputDifference, ValidationReport

_LONG = 24  # outputs that get a bar of their own: the worst
# Structure that other programs read; a person finds nothing in it.
_NOT_SHOWN = frozenset(("parameters", "dynamic_dims", "adapted_layers", "validation"))


def proof_page(proof: Proof) -> str:
    """The page: verdict, differences, latency, memory, perplexity, provenance."""
    name = proof.path.name
    title = f"{name} agrees with torch" if proof.passed else f"{name} does not agree with torch"
    return page(
        title,
        _verdict(proof),
        *(_differences(report) for report in proof.validations),
        _latency(proof),
        _memory(proof),
        _perplexity(proof),
        _provenance(proof),
        subtitle="An ONNX export, run beside the torch model that it was made from.",
    )


def _verdict(proof: Proof) -> Html:
    cases = sum(len(report.cases) for report in proof.validations)
    outputs = [o for r in proof.validations for c in r.cases for o in c.outputs]
    worst = max((o.max_abs / o.limit for o in outputs if o.limit > 0), default=0.0)
    rates = [output.top1 for output in outputs if output.top1 is not None]
    said = (
        verdict(True, f"every output of {cases} sets of inputs is within the tolerance")
        if proof.passed
        else verdict(False, f"{len(proof.failures)} things failed")
    )
    runtimes = dict.fromkeys(report.runtime for report in proof.validations)
    return section(
        "Verdict",
        paragraph(said),
        *(element("p", line, class_="bad") for line in proof.failures[:20]),
        facts(
            {
                "runtimes": ", ".join(runtimes),
                "largest difference": f"{max((o.max_abs for o in outputs), default=0.0):.1e}",
                "closest to its limit": f"{worst:.1%} of what is allowed",
                "least top-1 agreement": f"{min(rates):.2%}" if rates else None,
            }
        ),
    )


def _differences(report: ValidationReport) -> Html:
    worst: dict[str, tuple[CaseResult, OutputDifference]] = {}
    for case in report.cases:
        for output in case.outputs:
            best = worst.get(output.name)
            if best is None or _share(output) > _share(best[1]):
                worst[output.name] = (case, output)
    ranked = sorted((output for _, output in worst.values()), key=_share, reverse=True)[:_LONG]
    chart = bars(
        [
            Bar(o.name, o.max_abs, mark=o.limit, bad=not o.passed, text=f"{o.max_abs:.1e}")
            for o in ranked
        ],
        "Largest difference of each output over all cases; the mark is its limit (log scale)"
        + (f"; the {_LONG} closest to it" if len(worst) > _LONG else ""),
        log=True,
    )
    rows = [row for case in report.cases for row in _rows(case)]
    headings = ("case", "sizes", "output", "max abs", "limit", "relative", "1 − cosine", "top-1")
    details = element(
        "details",
        element("summary", f"All comparisons: {len(rows)}"),
        table((*headings, ""), rows, text=3),
    )
    title = f"{report.path.name} in {report.runtime}"
    if len(report.cases) == 1:  # several graphs or steps together
        title += f": {report.cases[0].name}"
    return section(title, chart, details)


def _rows(case: CaseResult) -> list[list[object]]:
    sizes = ", ".join(f"{name}={size}" for name, size in case.sizes.items())
    if case.error is not None:
        refused = verdict(False, "refused to run")
        return [[case.name, sizes, refused, "", "", "", "", "", ""]]
    return [
        [
            case.name,
            sizes,
            output.name,
            f"{output.max_abs:.1e}",
            f"{output.limit:.1e}",
            f"{output.relative:.1e}",
            "" if output.cosine is None else f"{1 - output.cosine:.1e}",
            "" if output.top1 is None else f"{output.top1:.1%}",
            verdict(output.passed, "ok" if output.passed else "failed"),
        ]
        for output in case.outputs
    ]


def _share(output: OutputDifference) -> float:
    """How much of its limit a difference takes."""
    if not math.isfinite(output.max_abs) or (output.limit == 0.0 and output.max_abs > 0.0):
        return math.inf
    return output.max_abs / output.limit if output.limit else 0.0


def _latency(proof: Proof) -> Html | None:
    if not proof.latencies:
        return None
    charts = []
    for row in proof.latencies:
        base = row.seconds["torch"]
        rows = [
            Bar(name, 1e3 * seconds, text=f"{1e3 * seconds:.2f} ms ({base / seconds:.2f}×)")
            for name, seconds in row.seconds.items()
        ]
        plural = "row" if row.batch == 1 else "rows"
        charts.append(bars(rows, f"{row.what}: {row.batch} {plural}, {row.rounds} rounds"))
    return section(
        "Latency",
        paragraph(
            "Median time of a call, all runtimes in turns in one process; in brackets how many "
            "times as fast as torch. Runtimes in Node.js are timed there, without moving tensors."
        ),
        *charts,
    )


def _memory(proof: Proof) -> Html | None:
    if not proof.memories:
        return None
    rows = []
    for row in proof.memories:
        label = f"{row.what}, batch {row.batch}"
        rows.append(
            Bar(label, row.run / 2**20, mark=row.weights / 2**20, text=f"{row.run / 2**20:.1f} MiB")
        )
    return section(
        "Memory",
        paragraph("onnxruntime in a process of its own, above what its import takes."),
        bars(rows, "Peak resident memory of loading and one call; the mark is the file's size"),
    )


def _perplexity(proof: Proof) -> Html | None:
    found = proof.perplexity
    if found is None:
        return None
    return section(
        "Perplexity",
        facts(
            {
                "text": f"{found.tokens:,} tokens",
                "torch": f"{found.torch:.5g}",
                "onnxruntime": f"{found.onnx:.5g}",
                "difference": verdict(found.passed, f"{found.difference:+.1e}"),
            }
        ),
    )


def _provenance(proof: Proof) -> Html | None:
    said = {
        name.removeprefix("gauge_ext."): value
        for name, value in proof.provenance.items()
        if name.startswith("gauge_ext.") and name.removeprefix("gauge_ext.") not in _NOT_SHOWN
    }
    if not said:
        return None
    return section(
        "Provenance", facts({name.replace("_", " "): value for name, value in said.items()})
    )
