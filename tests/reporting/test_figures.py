"""Figures: names that lie apart, and names that mean nothing to matplotlib, SVG or CSS."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

from fedsplit.reporting import figures
from fedsplit.reporting.figures import Line


def heights(svg: str, names: list[str]) -> list[float]:
    """The heights at which names stand, in points."""
    return [float(re.search(rf'y="([\d.]+)"[^>]*>{name}<', svg)[1]) for name in names]  # type: ignore[index]


def test_names_at_the_ends_of_lines_lie_apart_and_in_order() -> None:
    names = [f"line{number}" for number in range(8)]
    drawn = [Line(name, [(0, 1.0), (1, 2.0 + number * 1e-6)], look=number) for number, name in enumerate(names)]
    svg = figures.lines([*drawn, Line("far", [(0, 1.0), (1, 9.0)])], "round", "loss")
    found = heights(svg, names)
    assert all(below - above >= 9 for below, above in itertools.pairwise(found))
    assert 0 < heights(svg, ["far"])[0] < min(found) and max(found) < 194


def test_a_lone_point_equal_values_and_no_points_are_drawn() -> None:
    for points in ([(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], []):
        ElementTree.fromstring(figures.lines([Line("one", points, look=0)], "round", "loss"))
    ElementTree.fromstring(figures.bars({"one": (0.0,)}, str))
    ElementTree.fromstring(figures.bubbles({"one": {}}, ["a", "b"]))


def test_names_are_plain_text() -> None:
    name = "<b>$\\frac{1$ {x} & ü 漢"
    svg = figures.bars({name: (1.0,)}, str)
    written = [element.text for element in ElementTree.fromstring(svg).iter()]
    assert name in written or f"{name[:19]}…" in written


def test_figures_of_one_page_share_no_names_of_clips_and_markers() -> None:
    one, two = (figures.lines([Line("a", [(0, y), (1, 2.0)], look=0)], "round", "loss") for y in (1.0, 3.0))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r"url\(#([^)]+)\)", one)) <= ids[0]
    assert one == figures.lines([Line("a", [(0, 1.0), (1, 2.0)], look=0)], "round", "loss")


def test_lines_of_one_colour_differ_in_their_dashes() -> None:
    drawn = [Line("", [(0, 1.0 + look), (1, 2.0)], look=look) for look in (0, 6)]
    svg = figures.lines(drawn, "round", "loss")
    strokes = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="([^"]*var\(--series-0\)[^"]*)"', svg)
    assert len(set(strokes)) == 2
