"""Reports as one self-contained HTML file: no script, no network, nothing but the standard library.

:mod:`markup` builds escaped elements, :mod:`page` the page around them with its style, :mod:`plots`
bars (plain HTML, so that labels stay readable on a phone) and lines (inline SVG), :mod:`scales` the
axes of both. Every function returns :class:`Html`; plain text given to any of them is escaped.
"""

from __future__ import annotations

from gauge_ext.html.markup import Html, element, facts, paragraph, table, verdict
from gauge_ext.html.page import page, section
from gauge_ext.html.plots import Bar, Series, bars, lines

__all__ = [
    "Bar",
    "Html",
    "Series",
    "bars",
    "element",
    "facts",
    "lines",
    "page",
    "paragraph",
    "section",
    "table",
    "verdict",
]
