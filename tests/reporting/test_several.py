"""Several runs side by side: repetitions, spread, and runs that have little in common."""

from __future__ import annotations

import statistics
from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.groups import groups_of
from fedsplit.reporting.page import html_of
from fedsplit.reporting.run_record import read_run
from fedsplit.reporting.several import comparison


def test_runs_that_differ_in_their_seeds_are_repetitions(tmp_path: Path) -> None:
    gains = {0: 0.1, 1: 0.2, 2: 0.4}
    folders = [write_run(tmp_path / f"a-{seed}", gain=gain, seed=seed) for seed, gain in gains.items()]
    folders.append(write_run(tmp_path / "b", strategy="flora"))
    runs = [read_run(folder) for folder in folders]
    groups = groups_of(runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("fedavg", 3), ("flora", 1)]
    head, first, second = comparison(groups).rows
    after = [3.0 - 2 * gain for gain in gains.values()]
    column = head.index("loss after")
    assert first[column] == f"{statistics.fmean(after):.4f} ± {statistics.stdev(after):.4f}"
    assert second[column] == "2.8000" and first[head.index("loss before")] == "3.0000"
    text = html_of(runs)
    assert "Shaded: one standard deviation" in text and "\\begin{tabular}" in text


def test_losses_of_different_kinds_are_not_drawn_together(tmp_path: Path) -> None:
    text = write_run(tmp_path / "text")
    classes = write_run(tmp_path / "classes", **{"data.format": "classification"})
    page = html_of([read_run(text), read_run(classes)])
    assert "the losses cannot be compared: they are in nats a text and in nats a token" in page
    assert "Loss by round" not in page


def test_runs_of_unlike_lengths_and_without_summaries(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run-{seed}", rounds=3 - seed, seed=seed) for seed in (0, 1)]
    (folders[1] / "summary.json").unlink()
    runs = [read_run(folder) for folder in folders]
    rows = comparison(groups_of(runs)).rows
    assert rows[1][rows[0].index("loss after")] == "2.7000" and rows[2][rows[0].index("loss after")] == "2.8000"
    assert "the run has not ended" in html_of(runs)
