"""The inspection as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gauge_ext.html import (
    Bar,
    Html,
    Series,
    bars,
    element,
    facts,
    lines,
    page,
    paragraph,
    section,
    table,
    verdict,
)
from gauge_ext.inspect.adapter import PRUNING_LOSSES, AdapterInspection, LayerInspection
from gauge_ext.inspect.compare import Comparison
from gauge_ext.inspect.precision import FORMATS
from gauge_ext.inspect.readers import READERS

# More lines than this in one plot cannot be told apart.
_LINES = 8


def html_report(inspection: AdapterInspection) -> str:
    """Return a self-contained page: no script, nothing that is fetched.

    Args:
        inspection: What :func:`gauge_ext.inspect.inspect_adapter` returned.
    """
    compared = [_compared(other) for other in inspection.comparisons]
    return page(
        f"Adapter {inspection.path.name or inspection.path}",
        _summary(inspection),
        _norms(inspection),
        _spectra(inspection),
        _pruning(inspection),
        _rounding(inspection),
        _factors(inspection),
        *compared,
        _readers(inspection),
        _details(inspection),
        subtitle="What it does to each layer, in numbers that no choice of factors changes",
    )


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%" if math.isfinite(value) else "–"


def _summary(inspection: AdapterInspection) -> Html:
    bad = [finding for finding in inspection.findings if finding.effect == "misread"]
    copies = [other.name for other in inspection.comparisons if other.duplicate]
    return section(
        "In short",
        facts(
            {
                "folder": inspection.path,
                "base model": inspection.base_model or "not recorded",
                "layers": len(inspection.layers),
                "ranks": ", ".join(map(str, sorted({layer.rank for layer in inspection.layers}))),
                "parameters": f"{inspection.parameters:,}",
                "size": f"{inspection.nbytes:,} bytes, {', '.join(inspection.dtypes)}",
                "‖ΔW‖F, all layers": _number(inspection.frobenius, 4),
                "sha256": element("code", inspection.sha256),
            }
        ),
        *(paragraph(told) for told in inspection.notes),
        paragraph(
            verdict(not bad, "No reader is known to misread it")
            if not bad
            else verdict(
                False, f"Misread in silence by {_names(READERS[f.reader][0] for f in bad)}"
            )
        ),
        paragraph(verdict(False, f"The same update as {_names(copies)}")) if copies else None,
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _norms(inspection: AdapterInspection) -> Html:
    rows = [Bar(layer.name, layer.spectrum.frobenius) for layer in inspection.layers]
    parts: list[Html] = [bars(rows, "‖ΔW‖F of each layer")]
    shares = [(layer.name, layer.base) for layer in inspection.layers if layer.base is not None]
    if shares:
        parts.append(
            bars(
                [Bar(name, 100 * base.share) for name, base in shares],
                "‖ΔW‖F over ‖W₀‖F, the norm of the base's weight",
                unit="%",
            )
        )
        parts.append(
            bars(
                [Bar(name, 100 * base.overlap, mark=100 * base.chance) for name, base in shares],
                "Share of the update's energy between the k leading singular directions of the "
                "base's weight, k the rank; the mark is what a random update has on average",
                unit="%",
            )
        )
    return section("How large", *parts)


def _spectra(inspection: AdapterInspection) -> Html:
    largest = sorted(inspection.layers, key=lambda layer: -layer.spectrum.frobenius)[:_LINES]
    series = [
        Series(
            layer.name,
            list(range(1, len(layer.spectrum.singular_values) + 1)),
            layer.spectrum.singular_values,
        )
        for layer in largest
    ]
    left_out = len(inspection.layers) - len(largest)
    return section(
        "Spectra",
        lines(
            series,
            "Singular values of ΔW"
            + (f" of the {len(largest)} largest layers" if left_out else " of each layer"),
            x_label="index",
            y_label="σ",
            log_y=True,
        ),
        bars(
            [
                Bar(layer.name, layer.spectrum.effective_rank, mark=layer.rank)
                for layer in inspection.layers
            ],
            "Effective rank exp H(σ/Σσ); the mark is the rank that is stored",
        ),
    )


def _pruning(inspection: AdapterInspection) -> Html:
    rows = [
        (layer.name, layer.rank, *(layer.spectrum.rank_within(loss) for loss in PRUNING_LOSSES))
        for layer in inspection.layers
    ]
    saved = [
        (
            f"at most {_percent(loss)} of each ‖ΔW‖F lost",
            _percent(1 - _kept(inspection.layers, loss) / inspection.parameters),
        )
        for loss in PRUNING_LOSSES
    ]
    return section(
        "What can be pruned",
        paragraph(
            "The rank that the best approximation needs, layer by layer (Eckart and Young). Cut it "
            "with gauge-ext combine ADAPTER=1 --rank, or --energy."
        ),
        facts((name, f"{share} of the parameters saved") for name, share in saved),
        table(("layer", "rank", *(f"loss ≤ {_percent(loss)}" for loss in PRUNING_LOSSES)), rows),
    )


def _kept(layers: Sequence[LayerInspection], loss: float) -> int:
    return sum(
        layer.spectrum.rank_within(loss) * (layer.in_features + layer.out_features)
        for layer in layers
    )


def _rounding(inspection: AdapterInspection) -> Html:
    gauges = list(inspection.layers[0].rounding[0].errors)
    rows = []
    for name in FORMATS:
        errors = inspection.rounding(name)
        best = min(errors, key=errors.__getitem__)
        cells = [
            element("strong", _percent(errors[gauge])) if gauge == best else _percent(errors[gauge])
            for gauge in gauges
        ]
        rows.append((name, *cells))
    return section(
        "What fewer bits would cost",
        paragraph(
            "Error of ΔW after its factors were rounded, all layers together, measured, by the "
            "gauge in which they are stored. gauge-ext regauge changes the gauge."
        ),
        table(("format", *gauges), rows),
    )


def _factors(inspection: AdapterInspection) -> Html:
    return section(
        "The factors as they are stored",
        paragraph(
            "These depend on the gauge: 1 everywhere is the balanced gauge, in which B and A share "
            "the update evenly."
        ),
        table(
            ("layer", "‖sB‖F / ‖A‖F", "cond(P)", "rounding factor"),
            [
                (
                    layer.name,
                    _number(layer.balance.norm_ratio),
                    _number(layer.balance.condition),
                    _number(layer.balance.quantisation_factor),
                )
                for layer in inspection.layers
            ],
        ),
    )


def _compared(other: Comparison) -> Html:
    def span(angles: tuple[float, ...]) -> str:
        return f"{angles[0]:.1f}° – {angles[-1]:.1f}°" if angles else "–"

    lone = len(other.only_here) + len(other.only_there)
    return section(
        f"Beside {other.name}",
        facts(
            {
                "cosine, all layers": _number(other.cosine),
                "distance over the larger norm": _number(other.distance),
                "layers in one alone": lone or None,
            }
        ),
        paragraph(verdict(False, "One update in two copies")) if other.duplicate else None,
        table(
            ("layer", "cosine", "distance", "angles of outputs", "angles of inputs"),
            [
                (
                    layer.name,
                    _number(layer.cosine),
                    _number(layer.distance),
                    span(layer.column_angles),
                    span(layer.row_angles),
                )
                for layer in other.layers
            ],
        ),
    )


def _readers(inspection: AdapterInspection) -> Html:
    rows = [
        (READERS[found.reader][0], found.effect, found.reason, found.remedy)
        for found in inspection.findings
    ]
    sources = "; ".join(f"{name}: {source}" for name, source in READERS.values())
    return section(
        "What others make of the file",
        table(("reader", "effect", "why", "what to do"), rows, text=4)
        if rows
        else paragraph("Nothing is known to go wrong."),
        paragraph(f"What is known comes from: {sources}."),
    )


def _details(inspection: AdapterInspection) -> Html:
    rows = [
        (
            layer.name,
            f"{layer.out_features}×{layer.in_features}",
            layer.rank,
            _number(layer.scaling, 4),
            _number(layer.spectrum.frobenius, 4),
            _number(layer.spectrum.largest, 4),
            layer.spectrum.numerical_rank,
            f"{layer.spectrum.effective_rank:.2f}",
            f"{layer.spectrum.stable_rank:.2f}",
            _number(layer.spectrum.condition),
        )
        for layer in inspection.layers
    ]
    headings = ("layer", "out×in", "r", "s", "‖ΔW‖F", "σmax", "rank", "eff.", "stable", "cond.")
    return section("Every layer", table(headings, rows))
