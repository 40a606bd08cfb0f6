"""A federation in this process, with a sink that remembers and replies that can be spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from experiments import in_process
from experiments.in_process import LocalGrid, Silent
from fedsplit.config import Config
from fedsplit.events import Event
from fedsplit.events.screen import line_of
from fedsplit.federation.server_app import Federation


class Lines(Silent):
    """A sink that remembers the events, and the lines that they leave on the screen."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lines: list[str] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)
        if (line := line_of(event)) is not None:
            self.lines.append(line)


def federate(
    config: Config,
    out: Path,
    strategy: Any,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Message, Message], Message] = lambda message, reply: reply,
) -> tuple[Federation, Lines]:
    """Runs a whole federation.

    Args:
        config: Its configuration.
        out: The run's folder.
        strategy: Ours or Flower's.
        monkeypatch: Puts the grid that spoils where the federation gets its own.
        spoil: Changes replies on their way to the server.
    """

    class SpoiltGrid(LocalGrid):
        def deliver(self, message: Message) -> Message:
            return spoil(message, super().deliver(message))

    monkeypatch.setattr(in_process, "LocalGrid", SpoiltGrid)
    lines = Lines()
    return in_process.federate(config, out, strategy, lines), lines
