"""The comparison of a study's points: a table for the screen, for Markdown and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedsplit.reporting.text_table import Table
from fedsplit.studies.paired import PairedTest, Spread, caveat, compare, spread
from fedsplit.studies.run_measures import LOSS, UNTESTED, measures_of
from fedsplit.studies.study import Point, label_of
from fedsplit.studies.table import FinishedRun


@dataclass(frozen=True)
class Line:
    """Values of one measure at one point of a study.

    Attributes:
        label: Name of the point.
        measure: Name of the measure.
        values: Value by seed.
        spread: Mean and standard deviation over seeds.
        baseline: Name of the point compared with; empty for no comparison.
        test: Differences to the baseline; None for the baseline itself, and without a baseline.
    """

    label: str
    measure: str
    values: Mapping[int, float]
    spread: Spread
    baseline: str = ""
    test: PairedTest | None = None


@dataclass(frozen=True)
class FailedRun:
    """A run of a study that failed.

    Attributes:
        label: Name of the run's point of the grid.
        seed: Seed of the run.
        reason: Why the run failed, in one line.
    """

    label: str
    seed: int
    reason: str


def comparison(
    runs: Sequence[FinishedRun],
    points: Mapping[str, Point],
    baseline: Point,
) -> list[Line]:
    """Compares the points of a study.

    Args:
        runs: Finished runs of any seeds.
        points: Points of the study by label, in the order of the study.
        baseline: Values by axis that make a point the one to compare with. Every point is compared with the point that
            has these values, and its own values on all other axes.

    Returns:
        A line for each measure and point. A point whose runs have all failed has lines without values.
    """
    # The loss comes first, and has a table even if all runs have failed.
    by_measure: dict[str, dict[str, dict[int, float]]] = {LOSS: {}}
    with_result = {run.label for run in runs}
    for run in runs:
        for measure, value in measures_of(run).items():
            by_measure.setdefault(measure, {}).setdefault(run.label, {})[run.seed] = value
    lines = []
    for measure, by_label in by_measure.items():
        for label, point in points.items():
            if label not in by_label and label in with_result:  # its runs do not have this measure
                continue
            values = by_label.get(label, {})
            # Replaced values keep the places of their axes, so that the label is that of a point of the study.
            partner = label_of({**point, **baseline}) if baseline and measure not in UNTESTED else label
            test = None if partner == label else compare(values, by_label.get(partner, {}))
            compared_with = partner if test else ""
            lines.append(Line(label, measure, values, spread(list(values.values())), compared_with, test))
    return lines


def markdown(lines: Sequence[Line], failed: Sequence[FailedRun] = ()) -> str:
    """Returns a comparison as Markdown: a table for each measure, what the tests can show, and the runs that failed.

    Example:
        >>> print(markdown([Line("fedavg", "held-out loss", {0: 2.99, 1: 3.01}, Spread(3.0, 0.0141, 2))]))
        | held-out loss | seeds | mean | sd |
        | --- | ---: | ---: | ---: |
        | fedavg | 2 | 3.0000 | 0.0141 |
        <BLANKLINE>
    """
    blocks = []
    for rows in tables(lines):
        blocks.append(Table("", rows).markdown())
    if words := remark(lines):
        blocks.append(words)
    if failed:
        blocks.append("Runs that failed:")
        blocks.append("\n".join(f"- {run.label}, seed {run.seed}: {run.reason}" for run in failed))
    return "\n\n".join(blocks) + "\n"


def remark(lines: Sequence[Line]) -> str:
    """Returns what a reader must know about the tests of a comparison; empty without tests."""
    tests = [line.test for line in lines if line.test is not None]
    if not tests:
        return ""
    baselines = sorted({line.baseline for line in lines if line.baseline})
    paired = "Differences are to the run with the same seed and the baseline"
    named = f" {baselines[0]}" if len(baselines) == 1 else "'s values"
    return f"{paired}{named}. {caveat(max(test.pairs for test in tests), len(tests))}"


def tables(lines: Sequence[Line]) -> Iterator[list[list[str]]]:
    """Yields a table of texts for each measure: its header, then a row for each point."""
    # A dictionary, since a set would not keep the order of the measures.
    for measure in dict.fromkeys(line.measure for line in lines):
        of_measure = [line for line in lines if line.measure == measure]
        tests = [line.test for line in of_measure if line.test is not None]
        has_wilcoxon = any(test.wilcoxon_p is not None for test in tests)
        header = [measure, "seeds", "mean", "sd"]
        if tests:
            header += ["less baseline", "sd of it", "pairs", "t", "p"]
        if has_wilcoxon:
            header.append("Wilcoxon p")
        rows = [header]
        form = UNTESTED.get(measure, ".4f")
        for line in of_measure:
            row = [line.label, str(line.spread.count)]
            row += [_number(line.spread.mean, form), _number(line.spread.deviation, form)]
            if tests:
                row += _of_test(line.test)
            if has_wilcoxon:
                row.append(_number(line.test.wilcoxon_p if line.test else None, ".3g"))
            rows.append(row)
        yield rows


def _of_test(test: PairedTest | None) -> list[str]:
    """Returns the cells of a test; empty for the baseline."""
    if test is None:
        return [""] * 5
    return [
        _number(test.difference, "+.4f"),
        _number(test.deviation),
        str(test.pairs),
        _number(test.t, "+.2f"),
        _number(test.t_p, ".3g"),
    ]


def _number(value: float | None, form: str = ".4f") -> str:
    """Returns a number as a cell; a dash for None."""
    return "-" if value is None else format(value, form)


ORIGIN = ("versions", "git", "host")
"""Origin of a run's numbers, by the keys of summary.json; see `fedsplit.events.provenance`."""

MIXED = "mixed"
"""Origin of numbers that were not all made alike."""


def origin_of(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Returns the origin of the runs' numbers: versions, commit and machine, each `MIXED` if the runs differ in it.

    A finished run keeps the origin of the sweep that played it, so that `runs` lists date and commit of each run.
    """
    origin: dict[str, Any] = {}
    for key in ORIGIN:
        found = [run.summary.get(key) for run in runs]
        are_alike = all(each == found[0] for each in found)
        origin[key] = None
        if found:
            origin[key] = found[0] if are_alike else MIXED
    origin["runs"] = [
        {"name": run.name, "label": run.label, "seed": run.seed}
        | {key: run.summary.get(key) for key in ("date", "git", "versions")}
        for run in runs
    ]
    return origin


def as_json(
    lines: Sequence[Line],
    study: Mapping[str, Any],
    origin: Mapping[str, Any],
    failed: Sequence[FailedRun] = (),
) -> str:
    """Returns a comparison as JSON, with all that a reader needs to judge it.

    Args:
        lines: The comparison.
        study: Content of the study file.
        origin: Origin of the numbers; see `origin_of`.
        failed: Runs that failed.
    """
    document = {
        "study": study,
        **origin,
        "failed": [asdict(run) for run in failed],
        "comparison": [asdict(line) for line in lines],
    }
    # A study file may have dates, which JSON does not know.
    return json.dumps(document, indent=1, default=str) + "\n"
