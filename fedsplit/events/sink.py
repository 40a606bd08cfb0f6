"""The interface of a sink: a class with two methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, runtime_checkable

from fedsplit.events.event_types import Event


@runtime_checkable
class Sink(Protocol):
    """Receives the events of a run, such as to write them to a file or to send them to a tracker.

    A sink of the user's is named by `--sink path/to/mine.py:MySink`, or handed over from Python. It may subclass this
    class, which spares `close`, or have both methods without that. Its class is called without arguments.

    A sink is told of events one after the other, in the process of the server. The run waits while it handles one, so
    that a slow sink slows the run down. A sink that raises is named on the screen and gets no further events; the run
    goes on.

    Example:
        >>> from fedsplit.events import Event, Notice, RoundEvaluated, Sink
        >>> class HeldOutLoss(Sink):
        ...     def handle(self, event: Event) -> None:
        ...         if isinstance(event, RoundEvaluated):
        ...             print(f"round {event.round}: {event.loss:.2f}")
        >>> sink = HeldOutLoss()
        >>> sink.handle(Notice(text="not of interest"))
        >>> sink.close()
    """

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Receives one event.

        Args:
            event: One of the classes in `fedsplit.events`; tell them apart by `isinstance`, and leave alone those
                that are not of interest, since later versions may add others.
        """
        ...

    def close(self) -> None:
        """Ends the sink's work; called once, when the run has ended or failed."""
        return  # a body of its docstring alone would count as abstract to type checkers
