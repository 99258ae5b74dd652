"""The page around a report: its head, its style, its sections."""

from __future__ import annotations

from gauge_ext.html.markup import Html, element, join

# Light and dark, by what the reader's system asks for. The colours of series are those of Okabe and
# Ito (2008), told apart by readers with any common colour blindness.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b636c; --paper: #fff; --rule: #d9dee3;
  --wash: #f3f5f7; --good: #0a6b3d; --bad: #b3261e; --c0: #0072b2; --c1: #d55e00; --c2: #009e73;
  --c3: #cc79a7; --c4: #b58900; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a0a8b0; --paper: #15181b;
  --rule: #343a40; --wash: #1f2327; --good: #5fd39a; --bad: #ff8a80; --c0: #4aa3df; --c1: #f0863c;
  --c2: #3cc7a0; --c4: #e0b84c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 45rem; }
.subtitle, figcaption { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem;
  margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .75rem 0 1rem; }
figcaption { font-size: .9rem; margin-bottom: .35rem; }
.bars { display: grid; grid-template-columns: fit-content(45%) minmax(4rem, 1fr) max-content;
  gap: .3rem .6rem; align-items: center; font-size: .9rem; overflow-wrap: anywhere; }
.bars .track { position: relative; height: .9rem; background: var(--wash); }
.bars .fill { position: absolute; inset: 0 auto 0 0; min-width: 1px; background: var(--c0); }
.bars .fill.bad { background: var(--bad); }
.bars .mark { position: absolute; top: -.15rem; bottom: -.15rem;
  border-left: 2px solid var(--ink); }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .grid { stroke: var(--rule); }
svg polyline { fill: none; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .9rem; }
.legend svg { display: inline-block; width: 1.8rem; height: .6rem; margin-right: .35rem; }
code { font: .9em ui-monospace, monospace; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""


def section(title: str, *parts: object) -> Html:
    """A part of the page under a heading; parts that are None are left out."""
    return element("section", element("h2", title), *parts)


def page(title: str, *parts: object, subtitle: object = None) -> str:
    """A whole page that refers to nothing outside itself.

    Args:
        title: Its heading, and its name in the browser.
        parts: Sections, or any other markup; None is left out.
        subtitle: One line below the heading.

    Returns:
        The file's text; write it as UTF-8.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # What a browser enforces: nothing is fetched, no script runs, whatever a name may hold.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    top = (
        element("h1", title),
        None if subtitle is None else element("p", subtitle, class_="subtitle"),
    )
    body = element("body", element("main", join((*top, *parts), "\n")))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
