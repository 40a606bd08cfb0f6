"""What is shown: lines where there is no terminal, and one table."""

from __future__ import annotations

import io
import math

from rich.console import Console

from fedsplit.report import LiveWatcher, PlainWatcher, aligned, final_table, make_watcher, perplexity, size

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


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 7e13)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "70.0 TB"]
    assert perplexity(1e6) == math.inf


def test_columns_are_aligned() -> None:
    assert aligned([("", "loss"), ("ann", "1"), ("b", "2")]) == ["     loss", "ann     1", "b       2"]
