"""Elements of HTML, escaped unless they are markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

_VOID = frozenset({"br", "hr", "meta", "line", "rect", "circle", "polyline", "path"})


class Html(str):
    """A piece of markup. Anything that is not one is text, and is escaped where it is used."""

    __slots__ = ()


def escape(child: object) -> Html:
    """Text as markup: ``<`` becomes ``&lt;``; an :class:`Html` stays as it is."""
    return child if isinstance(child, Html) else Html(html.escape(str(child), quote=True))


def join(children: Iterable[object], separator: str = "") -> Html:
    """Several pieces as one; those that are None are left out."""
    return Html(separator.join(escape(child) for child in children if child is not None))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        tag: Its name.
        children: Text or markup inside it; None is left out.
        attributes: A trailing underscore is dropped (``class_``), other underscores become
            hyphens; None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{given}>" if tag in {"br", "hr", "meta"} else f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def paragraph(*children: object) -> Html:
    """A paragraph of text."""
    return element("p", *children)


def verdict(passed: bool, *children: object) -> Html:
    """A statement that is good or bad: by its colour, and by a sign for those who see none."""
    sign = "✓ " if passed else "✗ "
    return element("strong", sign, *children, class_="good" if passed else "bad")


def facts(pairs: Mapping[str, object] | Iterable[tuple[str, object]]) -> Html:
    """Names and values, one pair a line; values that are None are left out."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    found = [(name, value) for name, value in items if value is not None]
    return element(
        "dl",
        *(join((element("dt", name), element("dd", value))) for name, value in found),
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, text: int = 1) -> Html:
    """A table that scrolls sideways where it is wider than the screen.

    Args:
        headings: One for each column.
        rows: Cells, as many in each row as there are headings.
        text: How many columns at the left hold text; the others hold numbers, aligned right.

    Raises:
        ValueError: a row has another number of cells.
    """
    kinds = [None if index < text else "number" for index in range(len(headings))]
    head = (element("th", title, class_=kind) for title, kind in zip(headings, kinds, strict=True))
    body = (
        element(
            "tr",
            *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
        )
        for row in rows
    )
    inner = element(
        "table", element("thead", element("tr", *head)), element("tbody", join(body, "\n"))
    )
    return element("div", inner, class_="scroll", tabindex=0)
