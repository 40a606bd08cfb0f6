"""Formats numbers and tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

YEAR = 365.25 * 86_400
"""Seconds of a year."""

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


def plain_number(value: float) -> str:
    """Writes a number with six digits, or with all of its digits if six would make a whole number of it.

    Example:
        >>> plain_number(10.0), plain_number(1 / 3), plain_number(0.999999999)
        ('10', '0.333333', '0.999999999')
    """
    short = f"{value:g}"
    is_wrongly_whole = float(short).is_integer() and float(short) != value
    return repr(value) if is_wrongly_whole else short


def virtual_duration(seconds: float, unlike: float | None = None) -> str:
    """Writes a duration of the virtual clock: seconds, or days and years for a very long one.

    Args:
        seconds: The duration.
        unlike: A limit that the duration is compared with. As many decimals are written as tell both apart.

    Example:
        >>> virtual_duration(7.56), virtual_duration(3e6), virtual_duration(6e14)
        ('7.6 s', '34.7 days', '1.9e+07 years')
        >>> virtual_duration(0.3004, unlike=0.3)
        '0.3004 s'
    """
    unit, name = 1.0, "s"
    if seconds >= 1e6:
        unit, name = (86_400.0, "days") if seconds < 1e8 else (YEAR, "years")
    amount = seconds / unit
    if amount >= 1e6 and unit == YEAR:
        return f"{amount:.2g} years"
    decimals = _decimals(amount, None if unlike is None else unlike / unit)
    return f"{amount:,.{decimals}f} {name}"


def _decimals(value: float, unlike: float | None) -> int:
    """Returns the least number of decimals, from 1, that tells a value from another one."""
    if unlike is None or value == unlike:
        return 1
    sufficient = (some for some in range(1, 16) if round(value, some) != round(unlike, some))
    return next(sufficient, 16)


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
        pairs = zip(others, widths[1:], strict=True)
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in pairs]
        lines.append("  ".join(cells).rstrip())
    return lines
