"""A federation in this process, with a sink that remembers and answers that can be spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsplit.engines import in_process
from fedsplit.engines.in_process import LocalClients  # as it is before any test replaces it
from fedsplit.events import Event, Sink
from fedsplit.events.screen import line_of
from fedsplit.federation.federation import Federation
from fedsplit.federation.messages import Answer, Request
from fedsplit.settings.config import Config


class Lines(Sink):
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
    spoil: Callable[[Request, Answer], Answer] = lambda request, answer: answer,
) -> tuple[Federation, Lines]:
    """Runs a whole federation.

    Args:
        config: Its configuration.
        out: The run's folder.
        strategy: Ours or Flower's.
        monkeypatch: Puts the clients that spoil where the federation gets its own.
        spoil: Changes answers on their way to the server.
    """

    class SpoiltClients(LocalClients):
        def answer(self, request: Request) -> Answer:
            return spoil(request, super().answer(request))

    monkeypatch.setattr(in_process, "LocalClients", SpoiltClients)
    lines = Lines()
    return in_process.federate(config, out, strategy, lines), lines
