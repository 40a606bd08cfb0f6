"""Attempts: a client that is lost trains again, and a round that is lost is played again, with the same seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

TRIES = 3
"""How often a client may begin a round before it counts as failed: once, and twice more after its process was lost."""


class RoundLost(Exception):
    """A round cannot stand; it can be discarded and played again.

    Attributes:
        clients: Clients whose processes were lost, by which the round was lost.
    """

    def __init__(self, reason: str, clients: Collection[int] = ()) -> None:
        """Keeps the reason, one line for the reader."""
        super().__init__(reason)
        self.clients = tuple(clients)


@dataclass
class Attempt:
    """One attempt at a round, and how often each client has begun within it.

    Attributes:
        number: Number of earlier attempts at the round.
        excluded: Clients that count as failed in this attempt, as their processes were lost too often.

    Example:
        >>> attempt = Attempt(number=1)
        >>> attempt.of(client=4)
        3
        >>> attempt.begin_again(client=4)
        True
        >>> attempt.of(client=4)  # the trunk refuses steps of an attempt that lies behind its client
        4
    """

    number: int = 0
    excluded: frozenset[int] = frozenset()
    _again: Counter[int] = field(default_factory=Counter)

    def of(self, client: int) -> int:
        """Returns how often a client may have begun the round before, which its steps carry.

        The number grows with each new beginning, in this attempt or in a later one.
        """
        return self.number * TRIES + self._again[client]

    def begin_again(self, client: int) -> bool:
        """Counts a new beginning of a client; returns False if the client has had all of its tries."""
        if self._again[client] >= TRIES - 1:
            return False
        self._again[client] += 1
        return True
