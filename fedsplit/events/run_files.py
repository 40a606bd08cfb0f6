"""The sinks that write files of the run's folder: metrics.jsonl and summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.durable import write_text, writing
from fedsplit.events.event_types import (
    ClientFailed,
    ClientLost,
    Event,
    RoundAggregated,
    RoundDiscarded,
    RoundEvaluated,
    RoundTrained,
    RunEnded,
)

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


class MetricsFile:
    """Appends the events of the rounds to metrics.jsonl, a JSON object a line.

    Attributes:
        KINDS: Events that are written.
    """

    KINDS = (RoundTrained, RoundAggregated, RoundEvaluated, ClientFailed, ClientLost, RoundDiscarded)

    def __init__(self, folder: Path) -> None:
        """Takes the run's folder, which need not be there before the first event of a round."""
        self._path = folder / METRICS

    def handle(self, event: Event) -> None:
        """Appends an event of a round.

        Raises:
            NotWritten: It could not be written, such as on a full disk.
        """
        if isinstance(event, self.KINDS):
            append_document(self._path, event.to_document())

    def close(self) -> None:
        """Has nothing to do: the file is open only while an event is written."""


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


def append_document(path: Path, document: Mapping[str, Any]) -> None:
    """Appends a document to a file as one line of JSON.

    Raises:
        NotWritten: It could not be written.
    """
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(document) + "\n")
