"""Hands every event of a run to every sink."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType

from fedsplit.durable import Postponed
from fedsplit.events.event_types import Event, Notice, RunFailed
from fedsplit.events.sink import Sink
from fedsplit.loading import described
from fedsplit.watchdog import Watchdog

Emit = Callable[[Event], None]
"""Reports an event; what the code that runs a federation knows of sinks."""


class Emitter:
    """Hands events to sinks, in a fixed order.

    A context manager: leaving it closes all sinks, after `RunFailed` where an exception leaves it.

    Example:
        >>> class Printer(Sink):
        ...     def handle(self, event: Event) -> None:
        ...         print(event.to_document()["text"])
        >>> with Emitter([Printer()]) as emit:
        ...     emit(Notice(text="8 clients in 2 processes"))
        8 clients in 2 processes
    """

    def __init__(
        self,
        own: Sequence[Sink],
        users: Sequence[Sink] = (),
        watchdog: Watchdog | None = None,
    ) -> None:
        """Takes the sinks.

        Args:
            own: Sinks of fedsplit, such as files and the screen. The run needs them: whatever they raise ends it, but
                for a file that is written later.
            users: Sinks of the user's, called after those. One that raises is left out from then on.
            watchdog: Ends the wait for a sink of the user's that hangs; None to wait for ever.
        """
        self._watchdog = watchdog
        self._own = list(own)
        self._users = list(users)

    def __call__(self, event: Event) -> None:
        """Hands an event to all sinks."""
        for sink in self._own:
            try:
                sink.handle(event)
            except Postponed as postponed:
                # No reason to end the run, since the sink writes the event later.
                self(Notice(text=str(postponed), warning=True))
        # A copy, since a sink that fails leaves the list.
        for sink in list(self._users):
            self._try(sink, lambda sink=sink: sink.handle(event))  # type: ignore[misc]

    def close(self) -> None:
        """Closes all sinks; events that come later are dropped.

        The screen is closed last, so that it can still show a sink that fails at its end.
        """
        for sink in list(self._users):
            self._try(sink, sink.close)
        own, self._own, self._users = self._own, [], []
        for sink in own:
            sink.close()

    def _try(self, sink: Sink, call: Callable[[], object]) -> None:
        """Calls a sink of the user's; if it raises, leaves it out and says so."""
        guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._watchdog is not None:
            guard = self._watchdog.guarding(f"the sink {type(sink).__name__}")
        try:
            with guard:
                call()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it raises is no reason to lose a run
            # Before the notice, which would otherwise reach the sink that failed, and so on without an end.
            self._users.remove(sink)
            text = f"the sink {type(sink).__name__} failed and is left out from here on: {described(error)}"
            self(Notice(text=text, warning=True))

    def __enter__(self) -> Emitter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                # An exception without a message would leave a colon behind its type.
                self(RunFailed(reason=f"{type(error).__name__}: {error}".removesuffix(": ")))
        finally:
            self.close()
