"""Measures of a finished run that a study compares: losses, aggregation error, bytes, tokens and seconds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.events.run_files import METRICS
from fedsplit.studies.table import FinishedRun

LOSS = "held-out loss"
"""Measure that every run has."""

WORST = "worst client's loss"
"""Measure with the highest held-out loss of a client."""

FORGOTTEN = "forgotten"
"""Measure with the held-out loss less that right after a client's own steps, as the mean over the clients."""

ERROR = "aggregation error"
"""Measure with the mean of the aggregation error over the rounds."""

MB_UP = "adapter MB up"
"""Measure with the bytes of adapters that clients sent."""

MB_DOWN = "adapter MB down"
"""Measure with the bytes of adapters that clients received."""

UNTESTED = {
    ERROR: ".3g",
    MB_UP: ",.2f",
    MB_DOWN: ",.2f",
    "activation and gradient MB": ",.1f",
    "tokens": ",.0f",
    "training seconds": ",.1f",
}
"""Measures without a test, each with its form in tables.

The aggregation error, bytes and tokens hardly differ between seeds. Seconds depend on what else the machine does.
"""


def measures_of(run: FinishedRun) -> dict[str, float]:
    """Returns the measures of a finished run that are compared, by name.

    Losses and metrics are those of the adapter that the run left. Costs are totals of the run. A measure that the run
    did not report is left out.

    Raises:
        OSError: The run's metrics.jsonl cannot be read.
    """
    summary = run.summary
    measures: dict[str, Any] = {LOSS: summary["eval_loss"]["after"]}
    if summary.get("accuracy"):
        measures["accuracy"] = summary["accuracy"]["after"]
    for name, ends in summary.get("metrics", {}).items():
        measures[name] = ends["after"]
    measures |= _of_rounds(run.folder / METRICS, summary.get("eval_round"))
    sent = summary["bytes"]
    measures[MB_UP] = sent["adapter_up"] / 1e6
    measures[MB_DOWN] = sent["adapter_down"] / 1e6
    steps = [sent[f"{kind}_{way}"] for kind in ("activation", "gradient") for way in ("up", "down")]
    measures["activation and gradient MB"] = sum(steps) / 1e6
    measures["tokens"] = summary["tokens"]
    # Not of the whole run: a warm process has read the data for an earlier run, and so begins sooner.
    measures["training seconds"] = summary["tokens"] / (summary["tokens_per_second"] or math.nan)
    # NaN stands for a measure without a value, such as the seconds of a run without a speed.
    known = {}
    for name, value in measures.items():
        if value is not None and not math.isnan(value):
            known[name] = float(value)
    return known


def _of_rounds(metrics: Path, measured: int | None) -> dict[str, float]:
    """Returns the measures that are read from the rounds of a run.

    Args:
        metrics: metrics.jsonl of the run.
        measured: Round of the held-out loss.
    """
    measures: dict[str, float] = {}
    errors: dict[int, float | None] = {}
    for event in _events(metrics):
        # Of a round that was played again, the last event counts.
        if event["event"] == "aggregate":
            errors[event["round"]] = event["error"]
        elif event["event"] == "evaluate" and event["round"] == measured:
            forgotten = list(event["forgotten"].values())
            measures[WORST] = _highest(list(event["clients"].values()))
            measures[FORGOTTEN] = statistics.fmean(forgotten) if forgotten else math.nan
    known = [error for error in errors.values() if error is not None]
    measures[ERROR] = statistics.fmean(known) if known else math.nan
    return measures


def _highest(losses: Sequence[float]) -> float:
    """Returns the highest loss; NaN if a loss is NaN, or without losses."""
    if any(map(math.isnan, losses)):
        return math.nan
    return max(losses, default=math.nan)


def _events(metrics: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the events of a run."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
