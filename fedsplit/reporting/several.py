"""The report that compares several runs: groups of runs that differ in their seeds alone, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from fedsplit.formatting import counted, perplexity, size
from fedsplit.reporting import figures
from fedsplit.reporting.completeness import notes_of
from fedsplit.reporting.content import Page, Passage, Picture, Section
from fedsplit.reporting.figures import Line
from fedsplit.reporting.groups import UNLIKE, Group, distinct, groups_of, key_of, label_beside, notices
from fedsplit.reporting.origin import differing, where_from
from fedsplit.reporting.run_record import RunRecord, number, numbers, text
from fedsplit.reporting.series import (
    KINDS,
    PHASES,
    Points,
    errors,
    loss_against,
    losses,
    seconds_by_round,
    training_bytes,
)
from fedsplit.reporting.single import MOST_LINES, as_mapping, unit_of
from fedsplit.reporting.text_table import Table


def compared(runs: Sequence[RunRecord], baseline: RunRecord | None = None) -> Page:
    """Returns the content of the report that compares runs.

    Args:
        runs: At least two runs.
        baseline: Run to compare the losses with; None for none.
    """
    # Before `distinct`, since one of the notices names folders that were given twice.
    lines = notices(runs)
    runs, _ = distinct(runs)
    groups = groups_of(runs)
    table = comparison(groups)
    first = Section("Comparison", tables=[table])
    first.copies.append(Passage("The table in Markdown", table.markdown()))
    first.copies.append(Passage("The table in LaTeX (booktabs)", table.latex()))
    sections = [first, _losses(groups, baseline), _costs(groups), _errors(groups), _settings(runs), _runs(runs)]
    notes = lines + [f"{run.name}: {note}" for run in runs for note in notes_of(run)]
    repeated = max(len(group.runs) for group in groups)
    kinds = counted(len(groups), "kind of run", "kinds of run")
    subtitle = f"{kinds}, up to {repeated} runs of a kind" if repeated > 1 else ""
    number_of_runs = sum(len(group.runs) for group in groups)
    return Page(f"Comparison of {counted(number_of_runs, 'run', 'runs')}", subtitle, [], notes, sections)


def comparison(groups: Sequence[Group]) -> Table:
    """Returns the table of the results of each group, as mean and standard deviation over its runs."""
    columns = _columns([run for group in groups for run in group.runs])
    rows = [("", "runs", *columns)]
    for group in groups:
        cells = []
        for read, write in columns.values():
            values = [value for value in map(read, group.runs) if value is not None]
            cells.append(spread(values, write))
        rows.append((group.name, str(len(group.runs)), *cells))
    repeated = any(len(group.runs) > 1 for group in groups)
    note = "Mean ± standard deviation (n - 1) over the runs of a kind, which differ in their seeds alone."
    return Table("", rows, note if repeated else "")


Read = Callable[[RunRecord], float | None]
Write = Callable[[float], str]


def _columns(runs: Sequence[RunRecord]) -> dict[str, tuple[Read, Write]]:
    """Returns the columns of the comparison: how to read a number of a run, and how to write it."""

    def loss(when: str) -> Read:
        # A run that has not ended has no summary. The losses measured so far stand in.
        return lambda run: numbers(run.summary.get("eval_loss")).get(when) or _measured(run, when)

    found: dict[str, tuple[Read, Write]] = {
        "loss before": (loss("before"), "{:.4f}".format),
        "loss after": (loss("after"), "{:.4f}".format),
    }
    # Perplexity is the exponential of a loss by token, and of no other loss.
    if {unit_of(run) for run in runs} == {"nats a token"}:
        found["perplexity"] = (_perplexity, "{:.2f}".format)
    if any("accuracy" in run.summary for run in runs):
        found["accuracy"] = (lambda run: numbers(run.summary.get("accuracy")).get("after"), "{:.2%}".format)
    metrics = dict.fromkeys(text(name) for run in runs for name in as_mapping(run.summary.get("metrics")))
    for name in metrics:
        found[name] = (_metric(name), "{:.4g}".format)
    found["aggregation error"] = (lambda run: number(run.summary.get("aggregation_error")), "{:.3g}".format)
    found["bytes"] = (_bytes, size)
    found["seconds"] = (lambda run: number(run.summary.get("wall_seconds")), "{:,.1f}".format)
    found["tokens/s"] = (lambda run: number(run.summary.get("tokens_per_second")), "{:,.0f}".format)
    # A column that no run has a value for is left out.
    known = {}
    for name, column in found.items():
        read, _ = column
        if any(read(run) is not None for run in runs):
            known[name] = column
    return known


def _measured(run: RunRecord, when: str) -> float | None:
    """Returns the first or the last measured loss of a run without a summary."""
    points = losses(run).held_out
    if not points or (when == "before" and points[0][0] != 0):
        return None
    return points[0][1] if when == "before" else points[-1][1]


def _perplexity(run: RunRecord) -> float | None:
    after = numbers(run.summary.get("eval_loss")).get("after")
    return None if after is None else perplexity(after)


def _metric(name: str) -> Read:
    return lambda run: numbers(as_mapping(as_mapping(run.summary.get("metrics")).get(name))).get("after")


def _bytes(run: RunRecord) -> float | None:
    crossed = numbers(run.summary.get("bytes"))
    return training_bytes(crossed) if crossed else None


def spread(values: Sequence[float], write: Write) -> str:
    """Returns mean and standard deviation of values; the value alone, if all are equal; a dash for none.

    Example:
        >>> spread([1.0, 3.0], "{:.1f}".format), spread([2.0], "{:.1f}".format), spread([], str)
        ('2.0 ± 1.4', '2.0', '-')
    """
    if not values:
        return "-"
    if len(values) == 1:
        return write(values[0])
    deviation = statistics.stdev(values)
    return f"{write(statistics.fmean(values))} ± {write(deviation)}" if deviation else write(values[0])


def _averaged(series: Sequence[Points]) -> tuple[Points, list[float]]:
    """Returns the mean of several series point by point, and the standard deviations.

    The series are of equal experiments: their points are paired by their places, and x is averaged, too.
    """
    # A run that ended early has fewer points. Means are over points that all runs have.
    shortest = min(map(len, series))
    points: Points = []
    deviations = []
    for place in range(shortest):
        xs = [each[place][0] for each in series]
        ys = [each[place][1] for each in series]
        points.append((statistics.fmean(xs), statistics.fmean(ys)))
        deviations.append(statistics.stdev(ys) if len(ys) > 1 else 0.0)
    return points, deviations


def _lines(
    groups: Sequence[Group],
    read: Callable[[RunRecord], Points],
    scale: float = 1.0,
) -> list[Line]:
    """Returns a line for each group, with the spread over its runs."""
    drawn = []
    for look, group in enumerate(groups):
        series = [points for points in map(read, group.runs) if points]
        if not series:
            continue
        points, deviations = _averaged(series)
        scaled = [(x / scale, y) for x, y in points]
        # Further lines could not be told apart, and are drawn thin in the background.
        is_background = look >= MOST_LINES
        drawn.append(Line(group.label, scaled, look=None if is_background else look, spread=deviations))
    return drawn


def _losses(groups: Sequence[Group], baseline: RunRecord | None) -> Section:
    """Returns the section on held-out losses: by round, against bytes, and against time."""
    section = Section("Loss")
    units = {unit_of(run) for group in groups for run in group.runs}
    if len(units) > 1:
        reason = f"the losses cannot be compared: they are in {' and in '.join(sorted(units))}"
        return Section("Loss", tables=[Table("", [("", ""), ("No figure", reason)])])
    ylabel = f"held-out loss ({units.pop()})"
    band = " Shaded: one standard deviation." if any(len(group.runs) > 1 for group in groups) else ""
    axes: list[tuple[str, str, Callable[[RunRecord], Points], float, bool]] = [
        ("Loss by round", "round", lambda run: losses(run).held_out, 1.0, True),
        ("Loss against traffic", "MB sent in training", lambda run: loss_against(run, "bytes"), 1e6, False),
        ("Loss against time", "seconds since the start", lambda run: loss_against(run, "seconds"), 1.0, False),
    ]
    for title, xlabel, read, scale, whole in axes:
        drawn = _lines(groups, read, scale)
        if baseline is not None:
            label = label_beside(groups, baseline)
            points = [(x / scale, y) for x, y in read(baseline)]
            drawn.append(Line(label, points, look=len(drawn)))
        if any(len(line.points) > 1 for line in drawn):
            svg = figures.lines(drawn, xlabel, ylabel, whole=whole)
            section.pictures.append(
                Picture(title, svg, f"A line for each kind of run.{band}{key_of(groups, baseline)}")
            )
    return section


def _costs(groups: Sequence[Group]) -> Section:
    """Returns the section on bytes by kind, on seconds by phase and on peak memory."""
    section = Section("Traffic, time and memory")
    kinds = [kind for kind in KINDS if any(_crossed(group, kind) for group in groups)]
    if kinds:
        rows = [("", *(KINDS[kind] for kind in kinds))]
        for group in groups:
            cells = [size(_crossed(group, kind)) for kind in kinds]
            rows.append((group.name, *cells))
        section.tables.append(Table("Bytes by kind, up and down together", rows))
    phases = [words for words in PHASES.values() if any(_spent(group, words) for group in groups)]
    if phases:
        rows = [("", *phases)]
        for group in groups:
            cells = [f"{_spent(group, words):,.1f} s" for words in phases]
            rows.append((group.name, *cells))
        section.tables.append(Table("Seconds by phase", rows))
    rows = [("", "a client's process", "trunk")]
    for group in groups:
        peaks = [numbers(run.summary.get("peak_memory")) for run in group.runs]
        largest = []
        for party in ("client", "trunk"):
            largest.append(max((peak.get(party, 0.0) for peak in peaks), default=0.0))
        cells = [size(peak) if peak else "-" for peak in largest]
        rows.append((group.name, *cells))
    section.tables.append(Table("Peak memory", rows))
    return section


def _crossed(group: Group, kind: str) -> float:
    """Returns the mean bytes of a kind, in both directions, over the runs of a group."""
    totals = [numbers(run.summary.get("bytes")) for run in group.runs]
    return statistics.fmean(crossed.get(f"{kind}_up", 0.0) + crossed.get(f"{kind}_down", 0.0) for crossed in totals)


def _spent(group: Group, phase: str) -> float:
    """Returns the mean seconds of a phase over the runs of a group."""
    totals = []
    for run in group.runs:
        points = seconds_by_round(run).get(phase, [])
        totals.append(sum(seconds for _, seconds in points))
    return statistics.fmean(totals)


def _errors(groups: Sequence[Group]) -> Section:
    """Returns the section on the aggregation error by round, and on the norms of the adapters."""
    section = Section("Adapters")
    drawn = _lines(groups, errors)
    if any(len(line.points) > 1 for line in drawn):
        svg = figures.lines(drawn, "round", "aggregation error")
        caption = "Part of the clients' mean change that the aggregated adapter misses; 0: aggregation loses nothing."
        section.pictures.append(Picture("Aggregation error by round", svg, f"{caption}{key_of(groups)}"))
    norms: dict[str, tuple[float, ...]] = {}
    for group in groups:
        totals = [_norm(run) for run in group.runs]
        known = [total for total in totals if total is not None]
        if known:
            norms[group.label] = (statistics.fmean(known),)
    if norms:
        caption = "Norm of the change that the adapter makes to all layers together."
        section.pictures.append(
            Picture("Norm of the adapter", figures.bars(norms, "{:.3g}".format), f"{caption}{key_of(groups)}")
        )
    return section


def _norm(run: RunRecord) -> float | None:
    norms = numbers(run.summary.get("adapter_norms"))
    return sum(norm**2 for norm in norms.values()) ** 0.5 if norms else None


def _settings(runs: Sequence[RunRecord]) -> Section:
    """Returns the section on the settings in which the runs differ."""
    section = Section("Settings that differ")
    # Seeds make no group, and a reader still wants to see which were used.
    unlike = {}
    for name, values in differing(runs).items():
        if name == "seed" or name not in UNLIKE:
            unlike[name] = values
    rows: list[Sequence[str]] = [("", *unlike)]
    for place, run in enumerate(runs):
        cells = [values[place] or "-" for values in unlike.values()]
        rows.append((run.name, *cells))
    if len(unlike) > len(runs):  # the longer side reads better from above
        rows = list(zip(*rows, strict=True))
    if unlike:
        section.tables.append(Table("", rows, is_words=True))
    return section


def _runs(runs: Sequence[RunRecord]) -> Section:
    """Returns the section on where each run's numbers come from."""
    section = Section("Origin")
    origins = [where_from(run) for run in runs]
    names = dict.fromkeys(name for origin in origins for name in origin)
    common = {}
    for name in names:
        values = {origin.get(name) for origin in origins}
        if len(values) == 1:
            common[name] = origins[0].get(name, "")
    unlike = [name for name in names if name not in common]
    if common:
        section.tables.append(Table("Of all runs", [("", ""), *common.items()]))
    rows = [("", "folder", *unlike)]
    for run, origin in zip(runs, origins, strict=True):
        cells = [origin.get(name, "-") for name in unlike]
        rows.append((run.name, str(run.folder), *cells))
    section.tables.append(Table("By run", rows, is_words=True))
    return section
