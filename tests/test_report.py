"""What is shown: lines where there is no terminal, and one table."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from fedsplit.report import LiveWatcher, PlainWatcher, aligned, final_table, make_watcher, perplexity, round_line, size

SUMMARY = {
    "eval_loss": {"before": math.log(20), "after": math.log(10)},
    "parameters": {"bottom": {"total": 1000, "trainable": 10}, "top": {"total": 2000, "trainable": 0}},
    "bytes": {
        f"{what}_{way}": 1_500_000
        for what in ("activation", "gradient", "adapter", "evaluation")
        for way in ("up", "down")
    },
    "peak_memory": {"client": 700_000_000, "trunk": 500_000_000},
    "tokens": 12345,
    "tokens_per_second": 678.9,
    "wall_seconds": 12.34,
}


def test_plain_output_is_lines_without_escapes() -> None:
    console = Console(file=io.StringIO(), width=40)
    with make_watcher(console) as watcher:
        assert type(watcher) is PlainWatcher
        watcher.phase("moving", 1, 2)
        watcher.line("[a line] longer than forty characters, kept as it is 1:5")
    assert console.file.getvalue() == "[a line] longer than forty characters, kept as it is 1:5\n"


def test_a_terminal_sees_what_is_under_way() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with make_watcher(console) as watcher:
        assert type(watcher) is LiveWatcher
        watcher.phase("round 1/5  3/8 clients trained", 3, 8)
        watcher._progress.refresh()
        watcher.line("kept")
    assert "3/8 clients trained" in console.file.getvalue()
    assert "kept" in console.file.getvalue()


def test_the_table_says_all_that_was_asked_for() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(final_table(SUMMARY, "runs/x"))
    text = console.file.getvalue()
    for words in ("2.9957 -> 2.3026", "20.00 -> 10.00", "1,000, of which trained 10", "1.5 MB up, 1.5 MB down"):
        assert words in text
    for words in ("client process 700.0 MB, trunk 500.0 MB", "12.3 s; 12,345 tokens trained, 679 a second", "runs/x"):
        assert words in text


def test_the_table_says_which_round_the_adapter_is_of_where_it_is_not_the_last() -> None:
    console = Console(file=io.StringIO(), width=100)
    for left in (3, 2):
        console.print(final_table({**SUMMARY, "last_round": 3, "adapter_round": left}, "runs/x"))
    (said,) = [line for line in console.file.getvalue().splitlines() if "round" in line]
    assert said.split() == ["adapter", "of", "round", "2,", "the", "best", "of", "3"]


def test_the_spinner_and_the_clock_go_on_after_a_phase_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns shows what is under way in one line."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watcher = LiveWatcher(console)
    watcher.phase("round 1/5  8/8 trained", 8, 8)
    assert watcher._progress.tasks[0].finished
    watcher.phase("round 1/5  evaluating", 3, 8)
    (task,) = watcher._progress.tasks
    assert not task.finished and task.finished_time is None
    spinner, clock = watcher._progress.columns[0], watcher._progress.columns[-1]
    frames, times = set(), set()
    for tenth in range(5):
        monkeypatch.setattr(task, "get_time", lambda now=tenth / 10: now)
        frames.add(str(spinner.render(task)))
        clock._began -= 61
        times.add(str(clock.render(task)))
    assert len(frames) > 1
    assert len(times) == 5
    watcher.phase("round 10/10  512/512 trained  loss 2.9914  121,666 tokens/s", 512, 513)
    with console.capture() as shown:
        console.print(watcher._progress)
    assert len(shown.get().splitlines()) == 1 and "0:0" in shown.get()


def test_the_line_of_a_round_fits_a_terminal_and_names_what_matters_most() -> None:
    line = round_line("round 0/5", None, 3.0, None, 20.7, 0.0)
    assert line == "round 0/5  held-out loss 3.0000  perplexity 20.09  20.7 s"
    line = round_line("round 1/5", 3.1, 3.0, None, 27.9, 7617.0)
    assert line == "round 1/5  training loss 3.1000  held-out loss 3.0000  27.9 s  7,617 tokens/s"
    for accuracy in (None, 0.875):
        long = round_line("round 1000/1000", 13.1, 13.0, accuracy, 123456.7, 7617123.0)
        assert len(long) <= 80 and "held-out loss 13.0000" in long
    assert "accuracy 87.50%" in long


def test_metrics_stand_behind_the_loss_and_in_the_table() -> None:
    metrics = {"rouge": 0.123456, "length": None}
    line = round_line("round 1/5", 3.1, 3.0, None, 27.9, 7617.0, metrics)
    assert line == "round 1/5  training loss 3.1000  held-out loss 3.0000  rouge 0.1235  length -"
    console = Console(file=io.StringIO(), width=100)
    ends = {"rouge": {"before": 0.1, "after": 0.25}, "length": {"before": None, "after": 12.0}}
    console.print(final_table({**SUMMARY, "metrics": ends}, "runs/x"))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["rouge", "0.1", "->", "0.25"] in rows and ["length", "-", "->", "12"] in rows


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 7e13)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "70.0 TB"]
    assert perplexity(1e6) == math.inf


def test_columns_are_aligned() -> None:
    assert aligned([("", "loss"), ("ann", "1"), ("b", "2")]) == ["     loss", "ann     1", "b       2"]
