"""Figures as inline SVG that takes its colours and its font from the page's style sheet.

Lines differ in style and marker, and carry their names at their ends, so that no figure needs its colours. The
functions import matplotlib themselves: a command that draws nothing need not wait for it.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedsplit.reporting.series import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Width of a figure in inches, about that of a phone's screen at the size of the text."""

# matplotlib knows no CSS variables. Each stand-in is a colour that no figure would choose, so that `_themed` finds
# the stand-in in the SVG and nothing else.
INK, MUTED, RULE = "#010101", "#020202", "#030303"
"""Stand for the style sheet's colours of text, of what is less important, and of rules."""

SERIES = tuple(f"#0a0a0{number}" for number in range(6))
"""Stand for the style sheet's colours of lines."""

_CSS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
_CSS |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}

# From solid to dash-dot-dot, by matplotlib's pairs of an offset and the lengths of strokes and gaps.
_DASHES = (
    "-",
    (0, (5, 2)),
    (0, (5, 2, 1, 2)),
    (0, (1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P")

LABEL_CHARACTERS = 20
"""Most characters of a name beside a line."""

MOST_MARKERS = 24
"""Most points of a line that are marked."""

MOST_BARS = 80
"""Most bars of a panel; a line stands for more."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, and in the page's font
    "svg.hashsalt": "fedsplit",  # equal figures are equal files
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
        name: Name at the end of the line; empty for none.
        points: The line's points.
        look: Number of the colour, the dashes and the marker; None for a thin line in the background.
        spread: Standard deviation at each point, drawn as a band; empty for none.
    """

    name: str
    points: Points
    look: int | None = None
    spread: Sequence[float] = ()


def lines(
    drawn: Sequence[Line],
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
    whole: bool = True,
    band: Sequence[Points] = (),
) -> str:
    """Draws lines with their names at their ends.

    Args:
        drawn: The lines. A line without points is left out.
        xlabel: Words below the figure.
        ylabel: Words above the axis of y.
        level: Name and height of a horizontal line to compare with.
        whole: True if x takes whole numbers alone, such as rounds.
        band: A lower and an upper line, between which the background is shaded.

    Returns:
        The figure as SVG.
    """
    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ends: list[tuple[str, float, str]] = []
        if level is not None:
            name, height = level
            axes.axhline(height, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
            ends.append((name, height, MUTED))
        if band:
            low, high = band
            xs = [x for x, _ in low]
            lower = [y for _, y in low]
            upper = [y for _, y in high]
            axes.fill_between(xs, lower, upper, color=MUTED, alpha=0.15)
        for line in drawn:
            if line.points:
                ends.append(_draw_line(axes, line))
        axes.set_xlabel(xlabel)
        axes.set_title(ylabel, color=MUTED)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        else:
            axes.margins(x=0.08)
        named = [end for end in ends if end[0]]
        longest = max((len(_cut(name)) for name, _, _ in named), default=0)
        # First the room, since the places of the names depend on the size of the axes.
        _fit(figure, axes, longest)
        _name_ends(axes, named)

    return _svg(draw, height=2.7)


def _draw_line(axes: Axes, line: Line) -> tuple[str, float, str]:
    """Draws a line, and returns its name, the height of its end and its colour."""
    xs = [x for x, _ in line.points]
    ys = [y for _, y in line.points]
    if line.look is None:
        axes.plot(xs, ys, color=MUTED, linewidth=0.7, alpha=0.7)
        return line.name, ys[-1], MUTED
    colour = SERIES[line.look % len(SERIES)]
    # Shifted after each turn of the colours, so that lines of one colour and one marker have other dashes.
    style = _DASHES[(line.look + line.look // len(SERIES)) % len(_DASHES)]
    # Markers on every point of a long line would hide the dashes.
    every = max(1, len(xs) // MOST_MARKERS)
    marker = _MARKERS[line.look % len(_MARKERS)]
    axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markevery=every)
    if any(line.spread):
        low = [y - spread for y, spread in zip(ys, line.spread, strict=True)]
        high = [y + spread for y, spread in zip(ys, line.spread, strict=True)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    return line.name, ys[-1], colour


def _cut(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def _fit(figure: Figure, axes: Axes, characters: int) -> None:
    """Leaves room at the right for names of some characters, and below for the labels."""
    # About 4.8 points a character at a font size of 8.5, and 10 between axes and name. An inch has 72 points.
    right = 1 - (4.8 * characters + 10) / (72 * WIDTH)
    figure.subplots_adjust(left=0.105, right=right, top=0.91, bottom=0.16)


def _name_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Writes names to the right of the axes, each near the end of its line and none on another one."""
    if not ends:
        return
    axes.get_ylim()  # else the limits would not know the lines yet, and the heights below would be wrong
    height = axes.get_window_extent().height
    least = 9.5 * axes.figure.dpi / 72  # a line of text, in pixels
    ordered = sorted(ends, key=lambda end: end[1])
    bottom = axes.get_window_extent().y0
    places = [axes.transData.transform((0, y))[1] - bottom for _, y, _ in ordered]
    for number in range(1, len(places)):  # pushed up by the names below
        places[number] = max(places[number], places[number - 1] + least)
    places[-1] = min(places[-1], max(height, least * (len(places) - 1)))
    for number in reversed(range(len(places) - 1)):  # and down again by the frame
        places[number] = min(places[number], places[number + 1] - least)
    for (name, _, colour), place in zip(ordered, places, strict=True):
        axes.text(1.02, place / height, _cut(name), color=colour, transform=axes.transAxes, va="center", clip_on=False)


def panels(
    series: Mapping[str, Mapping[str, Points]],
    ylabel: Callable[[float], str],
    xlabel: str = "round",
) -> str:
    """Draws a panel of bars for each kind, over the same rounds.

    Args:
        series: Points of one series or two by kind, and by the name of the series. The bars of the second are outlined.
        ylabel: Writes a value at the axis.
        xlabel: Words below the panels.

    Returns:
        The figure as SVG.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(series))
    # Rounded up.
    rows = -(-len(series) // columns)

    height = 1.25 * rows + 0.2

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, (kind, bars) in enumerate(series.items()):
            axes = grid[place // columns][place % columns]
            _draw_bars(axes, bars)
            axes.set_title(f"{kind} ({', '.join(bars)})" if len(bars) > 1 else kind)
            axes.yaxis.set_major_formatter(lambda value, _: ylabel(value))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            # The words stand below the lowest panel of each column only.
            if place + columns >= len(series):
                axes.set_xlabel(xlabel)
        # An odd number of panels leaves a place without one, whose empty axes would be drawn.
        for place in range(len(series), rows * columns):
            grid[place // columns][place % columns].set_axis_off()
        top = 1 - 0.2 / height
        bottom = 0.38 / height
        figure.subplots_adjust(left=0.12, right=0.99, top=top, bottom=bottom)
        figure.subplots_adjust(hspace=0.55, wspace=0.32)

    return _svg(draw, height)


def _draw_bars(axes: Axes, bars: Mapping[str, Points]) -> None:
    """Draws one or two series of bars side by side; the first filled, the second outlined. Of many bars, lines."""
    width = 0.8 / len(bars)
    for number, points in enumerate(bars.values()):
        shift = (number - (len(bars) - 1) / 2) * width
        xs = [x + shift for x, _ in points]
        ys = [y for _, y in points]
        if len(points) > MOST_BARS:
            axes.plot(xs, ys, color=SERIES[0], linestyle=_DASHES[number], linewidth=1)
            continue
        fill = SERIES[0] if number == 0 else "none"
        axes.bar(xs, ys, width=width * 0.9, facecolor=fill, edgecolor=SERIES[0], linewidth=0.8)


def bars(
    values: Mapping[str, Sequence[float]],
    write: Callable[[float], str],
    parts: Sequence[str] = (),
) -> str:
    """Draws a horizontal bar for each name, with its value at its end.

    Args:
        values: Lengths of the pieces of a bar by name.
        write: Writes a value.
        parts: Names of the pieces, the first filled, the second outlined.

    Returns:
        The figure as SVG.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(values)
        left = [0.0] * len(names)
        for part in range(max(map(len, values.values()))):
            lengths = [values[name][part] for name in names]
            fill = SERIES[0] if part == 0 else "none"
            axes.barh(range(len(names)), lengths, left=left, facecolor=fill, edgecolor=SERIES[0], height=0.62)
            left = [start + length for start, length in zip(left, lengths, strict=True)]
        axes.set_yticks(range(len(names)), [_cut(name) for name in names])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        # matplotlib counts rows from below. The first name belongs at the top.
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[["bottom"]].set_visible(False)
        axes.set_xticks([])
        # Bars without any length would leave the axis without a range.
        longest = max(left) or 1.0
        # Leaves room for the value at the end of the longest bar.
        axes.set_xlim(0, longest * 1.28)
        for place, name in enumerate(names):
            words = " + ".join(write(length) for length in values[name])
            axes.text(left[place] + longest * 0.015, place, words, va="center", color=MUTED)
        if parts:
            axes.set_title(" + ".join(parts), color=MUTED)
        characters = max(len(_cut(name)) for name in names)
        margin = (4.4 * characters + 12) / (72 * WIDTH)
        top = 1 - 0.25 / _bars_height(len(names))
        figure.subplots_adjust(left=margin, right=0.99, bottom=0.02, top=top)

    return _svg(draw, height=_bars_height(len(values)))


def _bars_height(count: int) -> float:
    """Returns the height of a figure with some horizontal bars, in inches."""
    return 0.35 + 0.19 * count


def bubbles(values: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """Draws a disc for each row and column whose area is the value.

    Args:
        values: Values by row and column.
        columns: Names of the columns, in their order.

    Returns:
        The figure as SVG.
    """
    longest = max(len(_cut(column)) for column in columns)
    below = (4.8 * 0.82 * longest + 14) / 72  # names of the columns stand at 55 degrees
    height = below + 0.15 + 0.19 * len(values)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = list(values)
        every = (value for of_row in values.values() for value in of_row.values())
        most = max(every, default=1.0) or 1.0
        for place, row in enumerate(rows):
            found = []
            for name, value in values[row].items():
                if value and name in columns:
                    found.append((columns.index(name), value))
            sizes = [110 * value / most for _, value in found]
            xs = [x for x, _ in found]
            ys = [place] * len(found)
            axes.scatter(xs, ys, s=sizes, color=SERIES[0], linewidths=0)
        axes.set_yticks(range(len(rows)), [_cut(row) for row in rows])
        names = [_cut(column) for column in columns]
        axes.set_xticks(range(len(columns)), names, rotation=55, ha="right")
        axes.set_xlim(-0.6, len(columns) - 0.4)
        # From the last row to the first, since matplotlib counts from below.
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(True, axis="both")
        axes.tick_params(length=0)
        characters = max(len(_cut(row)) for row in rows)
        margin = (4.4 * characters + 12) / (72 * WIDTH)
        figure.subplots_adjust(left=margin, right=0.99, top=0.98, bottom=below / height)

    return _svg(draw, height)


def _svg(draw: Callable[[Figure], None], height: float) -> str:
    """Returns a figure as SVG whose colours and font are the page's.

    Args:
        draw: Draws on an empty figure.
        height: Height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        # Gives the figure a canvas without pyplot, which would keep all figures and might look for a screen.
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        # A date would make two files of equal figures unequal. The other entries are the same in all figures.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _themed(buffer.getvalue())


def _themed(svg: str) -> str:
    """Returns the SVG element of a file, with the style sheet's colours and font, and without a size of its own."""
    element = svg[svg.index("<svg") :]
    for stand_in, colour in _CSS.items():
        element = element.replace(stand_in, colour)
    for superfluous in _SUPERFLUOUS:
        element = superfluous.sub("", element)
    # Figures of one page must not share the names of clips and markers.
    figure = hashlib.sha256(element.encode()).hexdigest()[:8]
    element = _REFERENCE.sub(lambda match: f"{match[1]}{figure}-{match[2]}", element)
    return re.sub(r"\n\s*", "\n", element)


_SUPERFLUOUS = (
    re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
    re.compile(r"<style.*?</style>", re.DOTALL),  # it would hold for the whole page, which has a style sheet
    re.compile(r' (?:width|height)="[\d.]+pt"'),
    re.compile(r" font-family: [^;\"]*;"),
    re.compile(r'(?<=<g) id="[^"]*"'),
    # Upright text is written as turned by -0 degrees.
    re.compile(r' transform="rotate\(-0 [^"]*"'),
)
# matplotlib begins the names of markers with m, of clips with p and of hatches with h.
_REFERENCE = re.compile(r"""((?:id="|href="#|url\(#))([mph][0-9a-f]+)""")
