"""Bars and lines without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gauge_ext.html.markup import Html, element, join
from gauge_ext.html.scales import Scale, number, scale

_COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 38


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: What it stands for.
        value: How long it is; not finite: no bar, only the words.
        mark: A number to mark on its track, such as a limit.
        bad: Whether to draw it as something wrong.
        text: What to write at its end instead of the number.
    """

    label: str
    value: float
    mark: float | None = None
    bad: bool = False
    text: str | None = None


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: Its name in the legend.
        x: Places, ascending.
        y: Values, as many; those that are not finite (or, on a log axis, not positive) leave a gap.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


def bars(rows: Sequence[Bar], caption: str, *, log: bool = False, unit: str = "") -> Html:
    """Horizontal bars on one scale, which begins at 0 unless it is logarithmic.

    Args:
        rows: The bars, from above.
        caption: What is drawn.
        log: Whether the scale is logarithmic; its beginning is then below the smallest value.
        unit: Written after each number.
    """
    marks = [row.mark for row in rows if row.mark is not None]
    values = [*(row.value for row in rows), *marks]
    # On a log scale a bar that began at the smallest value would leave that one without any.
    axis = scale([*values, *(value / 3 for value in values if log)], log=log, zero=True)
    cells = join(_bar(row, axis, unit) for row in rows)
    return element("figure", element("figcaption", caption), element("div", cells, class_="bars"))


def lines(
    series: Sequence[Series],
    caption: str,
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Html:
    """Lines over common axes, each with its own colour and dash, and a legend if there are several.

    Args:
        series: The lines.
        caption: What is drawn.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is.

    Raises:
        ValueError: a series has another number of places than of values.
    """
    across = scale([x for line in series for x in line.x], log=log_x)
    up = scale([y for line in series for y in line.y], log=log_y)

    def left(x: float) -> float:
        return _LEFT + across.place(x) * (_WIDTH - _LEFT - _RIGHT)

    def top(y: float) -> float:
        return _HEIGHT - _BOTTOM - up.place(y) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = join(
        (
            *_axes(across, up, left, top),
            element("text", x_label, x=_WIDTH - _RIGHT, y=_HEIGHT - 4, text_anchor="end"),
            *(_line(line, index, left, top, log_x, log_y) for index, line in enumerate(series)),
        )
    )
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    picture = element("svg", drawn, viewBox=box, role="img", aria_label=f"{caption}: {y_label}")
    legend = join(_legend(line.label, index) for index, line in enumerate(series))
    return element(
        "figure",
        element("figcaption", f"{caption} ({y_label})"),
        picture,
        element("div", legend, class_="legend") if len(series) > 1 else None,
    )


def _bar(row: Bar, axis: Scale, unit: str) -> Html:
    words = number(row.value) + unit if row.text is None else row.text
    inside = []
    if math.isfinite(row.value):
        width = f"width:{100 * axis.place(row.value):.2f}%"
        inside.append(element("span", class_="fill bad" if row.bad else "fill", style=width))
    if row.mark is not None:
        inside.append(
            element("span", class_="mark", style=f"left:{100 * axis.place(row.mark):.2f}%")
        )
    return join(
        (
            element("span", row.label),
            element("span", *inside, class_="track"),
            element("span", words, class_="value bad" if row.bad else "value"),
        )
    )


def _axes(
    across: Scale, up: Scale, left: Callable[[float], float], top: Callable[[float], float]
) -> list[Html]:
    drawn = []
    for tick in up.ticks:
        y = f"{top(tick):.1f}"
        drawn.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(
            element("text", number(tick), x=_LEFT - 6, y=y, dy="0.35em", text_anchor="end")
        )
    for tick in across.ticks:
        x = f"{left(tick):.1f}"
        drawn.append(
            element("text", number(tick), x=x, y=_HEIGHT - _BOTTOM + 16, text_anchor="middle")
        )
    return drawn


def _line(
    line: Series,
    index: int,
    left: Callable[[float], float],
    top: Callable[[float], float],
    log_x: bool,
    log_y: bool,
) -> Html:
    def shown(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    runs: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if shown(x, log_x) and shown(y, log_y):
            runs[-1].append(f"{left(x):.1f},{top(y):.1f}")
        elif runs[-1]:
            runs.append([])
    style = _stroke(index)
    pieces = []
    for run in runs:
        if len(run) == 1:  # a line of one point is invisible
            across, _, up = run[0].partition(",")
            fill = f"fill:var(--c{index % _COLOURS})"
            pieces.append(element("circle", cx=across, cy=up, r=3, style=fill))
        elif run:
            pieces.append(element("polyline", points=" ".join(run), style=style))
    return join(pieces)


def _legend(label: str, index: int) -> Html:
    sample = element("polyline", points="0,5 28,5", style=_stroke(index))
    return element("span", element("svg", sample, viewBox="0 0 28 10", aria_hidden="true"), label)


def _stroke(index: int) -> str:
    dash = _DASHES[index // _COLOURS % len(_DASHES)] if index >= _COLOURS else ""
    return f"stroke:var(--c{index % _COLOURS})" + (f";stroke-dasharray:{dash}" if dash else "")
