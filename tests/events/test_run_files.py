"""The files that sinks write: an event a line, and a summary that is whole or not there."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.durable import NotWritten, Postponed
from fedsplit.events import ClientFailed, Notice, RoundAggregated, RunEnded
from fedsplit.events.run_files import MetricsFile, SummaryFile, append_lines


def aggregated(round: int) -> RoundAggregated:
    return RoundAggregated(round=round, seconds=0.5, error=None, layers={"l": 0.1}, residual_rank={}, elapsed=2.0)


def test_events_of_rounds_are_a_line_each(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path)
    failed = ClientFailed(round=2, phase="training", client=3, client_name="ann", reason="out of luck")
    for event in (aggregated(1), Notice(text="not of a round"), failed):
        sink.handle(event)
    sink.close()
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["event"], first["round"], first["layers"]) == ("aggregate", 1, {"l": 0.1})
    assert (second["event"], second["client"], second["reason"]) == ("client-failed", 3, "out of luck")


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    for round in (1, 2):
        MetricsFile(tmp_path).handle(aggregated(round))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_the_summary_is_written_when_a_run_has_ended(tmp_path: Path) -> None:
    sink = SummaryFile(tmp_path)
    sink.handle(aggregated(1))
    assert not any(tmp_path.iterdir())
    sink.handle(RunEnded(summary={"seed": 1}, folder=str(tmp_path)))
    assert json.loads((tmp_path / "summary.json").read_text()) == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match=r"metrics\.jsonl could not be written \(No such file"):
        append_lines(tmp_path / "nowhere" / "metrics.jsonl", [b"{}\n"])
    with pytest.raises(NotWritten, match=r"summary\.json could not be written"):
        SummaryFile(tmp_path / "nowhere").handle(RunEnded(summary={}, folder=""))


@contextlib.contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rounds_in(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 10])
def test_events_wait_while_a_disk_is_full_and_lose_neither_lines_nor_order(tmp_path: Path, room: int) -> None:
    """Not even a part of a line is left of one that does not fit; the first one that has to wait is reported."""
    sink = MetricsFile(tmp_path)
    sink.handle(aggregated(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_room_beyond(size + room):
        with pytest.raises(Postponed, match=r"metrics\.jsonl could not be written \(File too large\).*wait in memory"):
            sink.handle(aggregated(2))
        sink.handle(aggregated(3))
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        with pytest.raises(NotWritten):  # a run whose events are not written has not come to its end
            sink.handle(RunEnded(summary={}, folder=str(tmp_path)))
    assert rounds_in(tmp_path) == [1]
    sink.handle(aggregated(4))
    assert rounds_in(tmp_path) == [1, 2, 3, 4]
    with no_room_beyond(size), pytest.raises(Postponed):
        sink.handle(aggregated(5))
    sink.close()
    assert rounds_in(tmp_path) == [1, 2, 3, 4, 5]


def test_events_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(NotWritten, match="symbolic links"):
        append_lines(tmp_path / "metrics.jsonl", [b"{}\n"])
    assert (tmp_path / "mine").read_text() == "mine"
