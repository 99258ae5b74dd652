"""Pages that refer to nothing outside, tables and plots that show the numbers they were given."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from gauge_ext.html import Bar, Html, Series, bars, element, facts, lines, page, section, table
from gauge_ext.html.scales import number, scale

EVIL = '<script>alert("x")</script>&'
VOID = {"meta", "br", "hr"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not the one that is open; keeps tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def widths(text: str) -> list[float]:
    return [float(found) for found in re.findall(r'class="fill[^>]*width:([\d.]+)%', text)]


def test_a_page_holds_everything_and_runs_nothing():
    parts = (
        section(EVIL, facts({EVIL: EVIL, "nothing": None})),
        table(["name", "value"], [[EVIL, 3]]),
        bars([Bar(EVIL, 1.0)], EVIL),
        lines([Series(EVIL, [0, 1], [1, 2])] * 2, EVIL, x_label=EVIL, y_label=EVIL),
    )
    text = page(EVIL, *parts, None, subtitle=EVIL)
    found = Balanced(text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"https?:|url\(|@import", text)
    assert found.text.count(EVIL) >= 10
    assert text.startswith("<!doctype html>")
    assert "nothing" not in found.text


def test_markup_is_escaped_once():
    inner = element("b", "a < b")
    assert inner == "<b>a &lt; b</b>"
    assert element("p", inner, class_="x y", data_n=3, id=None) == (
        '<p class="x y" data-n="3"><b>a &lt; b</b></p>'
    )
    assert element("p", Html("<i>")) == "<p><i></p>"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="zip"):
        lines([Series("a", [1, 2], [1])], "c", x_label="x", y_label="y")


def test_bars_are_as_long_as_their_values():
    text = bars([Bar("a", 10.0), Bar("b", 5.0, mark=2.5), Bar("c", math.nan)], "c", unit=" ms")
    assert widths(text) == [100.0, 50.0]
    assert "left:25.00%" in text
    assert [w for w in ("10 ms", "5 ms", "nan ms") if w not in Balanced(text).text] == []


def test_bars_on_a_log_scale():
    text = bars([Bar("a", 1e-2), Bar("b", 1e-4, bad=True), Bar("zero", 0.0)], "c", log=True)
    assert widths(text) == [100.0, 33.33, 0.0]
    assert "fill bad" in text


def test_lines_go_through_their_points_and_break_at_gaps():
    text = lines(
        [Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 3.0, 4.0]), Series("b", [2], [2.0])],
        "c",
        x_label="x",
        y_label="y",
    )
    drawn = [
        [tuple(map(float, p.split(","))) for p in points.split()]
        for points in re.findall(r'points="([^"]+)"', text)
    ][:2]
    assert [len(run) for run in drawn] == [2, 2]
    (x0, y0), (x1, y1) = drawn[0]
    (x3, y3), (x4, y4) = drawn[1]
    assert x1 - x0 == pytest.approx(x4 - x3) == pytest.approx((x3 - x1) / 2, abs=0.2)
    assert y0 - y1 == pytest.approx(y3 - y4, abs=0.2) == pytest.approx(y1 - y3, abs=0.2)
    assert y0 > y4  # upwards
    assert text.count("<circle") == 1


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [3.0], [-2.0, 5.0], [1e-9, 1e9]])
@pytest.mark.parametrize("log", [False, True])
def test_a_scale_holds_its_values(values, log):
    axis = scale(values, log=log)
    assert axis.low < axis.high
    assert axis.ticks[0] == axis.low
    assert 2 <= len(axis.ticks) <= 8
    for value in values:
        if math.isfinite(value) and (value > 0 or not log):
            assert axis.low <= value <= axis.high


def test_scales_place_by_differences_or_by_ratios():
    assert scale([0, 10]).place(5) == 0.5
    assert scale([1, 100], log=True).place(10) == pytest.approx(0.5)
    assert scale([1, 100], log=True).place(0) == 0.0
    assert scale([4, 5], zero=True).low == 0.0


def test_numbers_in_few_characters():
    found = [number(v) for v in (0.0, 0.25, 1234.5, 3.14e-7, 2e9, math.inf, -math.inf, math.nan)]
    assert found == ["0", "0.25", "1,234", "3.1e-7", "2e9", "∞", "−∞", "nan"]


def test_the_browser_tells_what_is_wrong_with_a_page(look):
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    wide = "<p style='width:900px'>wide</p><table width=900><tr><td>wide</table>"
    seen = look(f"{policy}{wide}<img src='http://127.0.0.1:9/outside.png'>", "p")
    assert seen.scroll_width >= 900 > seen.client_width == 390
    assert any("outside.png" in line for line in seen.errors)  # a request that was blocked
    assert seen.counts == [1]


def test_long_names_and_long_numbers_of_bars_fit_a_phone(look):
    name = "base_model.model.layers.11.self_attention.query_projection"
    rows = [Bar(name, 1.0, text="0.123 of 12345.6 (all but 0.5%)"), Bar(name, 2.0)]
    seen = look(page("Bars", section("All", bars(rows, "shares"))), ".value")
    assert seen.counts == [2]
    assert seen.scroll_width <= seen.client_width
