"""Formats numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH = 80
"""Columns of a terminal by default, and the greatest length of a round's line."""


def perplexity(loss: float) -> float:
    """Returns the exponential of a mean loss in nats; infinity if the result is too large for a float.

    Example:
        >>> perplexity(0.0), perplexity(1000.0)
        (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf  # math.exp raises an error above 709


def measures_pairs(metrics: Mapping[str, object] | None) -> bool:
    """Returns True for the metrics of a run on pairs, whose loss is no loss of tokens and has no perplexity.

    Example:
        >>> measures_pairs({"preference_accuracy": 0.5}), measures_pairs(None)
        (True, False)
    """
    return "preference_accuracy" in (metrics or {})


def counted(number: int, singular: str, plural: str) -> str:
    """Writes a number with the noun that it counts.

    Example:
        >>> counted(1, "process", "processes"), counted(2, "process", "processes")
        ('1 process', '2 processes')
    """
    return f"{number:,} {singular if number == 1 else plural}"


def size(nbytes: float) -> str:
    """Writes a number of bytes with a unit, in powers of 1000.

    Example:
        >>> size(1_234_567)
        '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def fitted(fields: Sequence[str], width: int = WIDTH) -> str:
    """Joins the fields of a line. Fields at the end that do not fit are left out.

    Args:
        fields: Texts, the most important ones first.
        width: Columns of the line at most.

    Example:
        >>> fitted(["round 1/5", "training loss 3.10", "7,367 tokens/s"], width=30)
        'round 1/5  training loss 3.10'
    """
    line = fields[0]
    for field in fields[1:]:
        if len(line) + len("  ") + len(field) > width:
            break
        line += f"  {field}"
    return line


def metric_mean(value: float | None) -> str:
    """Returns a metric's mean with four digits; a dash for None.

    Example:
        >>> metric_mean(0.123456), metric_mean(None)
        ('0.1235', '-')
    """
    return "-" if value is None else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table. The first column is aligned to the left, all further columns to the right.

    Args:
        rows: Cells by row. All rows have the same number of cells.

    Example:
        >>> aligned([("", "loss"), ("ann", "1"), ("b", "2")])
        ['     loss', 'ann     1', 'b       2']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return lines
