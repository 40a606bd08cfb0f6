"""The sinks that write files of the run's folder: metrics.jsonl and summary.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.durable import NotWritten, Postponed, open_here, write_text, writing
from fedsplit.events.event_types import (
    ClientFailed,
    ClientLost,
    ClientUnused,
    Event,
    RoundAggregated,
    RoundCost,
    RoundDiscarded,
    RoundEvaluated,
    RoundReplayed,
    RoundTrained,
    RunEnded,
)

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


class MetricsFile:
    """Appends the events of the rounds to metrics.jsonl, a JSON object a line.

    Lines that cannot be written, such as on a full disk, wait in memory and are written before the next one.

    Attributes:
        KINDS: Events that are written.
    """

    KINDS = (
        RoundTrained,
        RoundAggregated,
        RoundEvaluated,
        RoundCost,
        RoundReplayed,
        ClientFailed,
        ClientLost,
        ClientUnused,
        RoundDiscarded,
    )

    def __init__(self, folder: Path) -> None:
        """Takes the run's folder, which need not be there before the first event of a round."""
        self._path = folder / METRICS
        self._waiting: list[bytes] = []

    def handle(self, event: Event) -> None:
        """Appends an event of a round.

        Raises:
            Postponed: It could not be written, the first one in a row.
            NotWritten: The run has ended, and lines of it still cannot be written.
        """
        if isinstance(event, RunEnded) and self._waiting:
            # Not postponed any more: a run must not end as if all its events were written.
            append_lines(self._path, self._waiting)
            self._waiting = []
        if not isinstance(event, self.KINDS):
            return
        is_first = not self._waiting
        self._waiting.append(_line(event.to_document()))
        try:
            append_lines(self._path, self._waiting)
        except NotWritten as error:
            if is_first:
                raise Postponed(f"{error}; lines of {METRICS} wait in memory until they can be written") from error
            return
        self._waiting = []

    def close(self) -> None:
        """Tries once more to write lines that wait."""
        with contextlib.suppress(NotWritten):  # it was reported when they had to wait
            append_lines(self._path, self._waiting)
            self._waiting = []


class SummaryFile:
    """Writes summary.json when a run has ended."""

    def __init__(self, folder: Path) -> None:
        """Takes the run's folder."""
        self._path = folder / SUMMARY

    def handle(self, event: Event) -> None:
        """Writes the summary of a run that has ended, whole or not at all.

        Raises:
            NotWritten: It could not be written, such as on a full disk.
        """
        if isinstance(event, RunEnded):
            write_text(self._path, json.dumps(event.summary, indent=2) + "\n")

    def close(self) -> None:
        """Has nothing to do."""


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Appends lines to a file, all or none of them.

    Raises:
        NotWritten: They could not be written. The file is as it was.
    """
    if not lines:
        return
    # Without a buffer, a full disk is an error here, and not when the file is closed.
    with writing(path), open(path, "ab", buffering=0, opener=open_here) as file:
        size = file.tell()
        content = b"".join(lines)
        try:
            while content:  # a disk that fills up takes a part
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"
