"""Messages for nodes that are away: they wait until the nodes are there again, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message

_LOOK_SECONDS = 1.0
"""Time between two looks at which nodes are there."""


class AwayNodes:
    """Holds messages back whose nodes are away.

    Flower answers a message to such a node at once with an error, so that a site that is being started again would
    use up its tries within a moment.

    Example:
        >>> away = AwayNodes(60.0, there=lambda: [1, 2])
        >>> away.take([]), away.count
        ([], 0)
    """

    def __init__(
        self,
        seconds: float,
        there: Callable[[], Iterable[int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without a message.

        Args:
            seconds: Longest time that messages wait for a node. 0 if nodes never leave.
            there: Returns the nodes that are there.
            clock: Seconds, always growing.
        """
        self._seconds, self._there, self._clock = seconds, there, clock
        self._held: list[Message] = []
        self._since: dict[int, float] = {}  # by node: when it was found away
        self._next_look = 0.0

    @property
    def count(self) -> int:
        """Number of messages that wait."""
        return len(self._held)

    def take(self, messages: list[Message]) -> list[Message]:
        """Returns the messages to send now, of new messages and of those that wait.

        A message is sent, too, when its node was away for too long. Flower's answer then names the reason.

        Args:
            messages: New messages.
        """
        now = self._clock()
        # To ask which nodes are there is a request to the SuperLink. Waiting messages alone ask once in
        # `_LOOK_SECONDS`.
        if not self._seconds or not (messages or (self._held and now >= self._next_look)):
            return messages
        self._next_look = now + _LOOK_SECONDS
        there = set(self._there())
        ready, held = [], []
        for message in [*self._held, *messages]:
            node = message.metadata.dst_node_id
            if node in there:
                self._since.pop(node, None)
                ready.append(message)
            elif now - self._since.setdefault(node, now) >= self._seconds:
                ready.append(message)
            else:
                held.append(message)
        self._held = held
        return ready

    def forget(self) -> None:
        """Drops the messages that wait."""
        # `_since` stays: the time that a node is away does not begin again.
        self._held = []
