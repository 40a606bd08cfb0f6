"""Attempts: a lost client trains again, and a lost round is played again, with the same seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

TRIES = 3
"""Number of times that a client may begin a round. After the loss of its process for the third time it has failed."""


class RoundLost(Exception):
    """A round is lost. It can be discarded and played again.

    Attributes:
        clients: Clients whose lost processes are the reason.
    """

    def __init__(self, reason: str, clients: Collection[int] = ()) -> None:
        """Keeps the reason, one line for the reader."""
        super().__init__(reason)
        self.clients = tuple(clients)


@dataclass
class Attempt:
    """One attempt at a round, with the number of restarts of each client.

    Attributes:
        number: Number of earlier attempts at the round.
        excluded: Clients that count as failed in the attempt, since their processes were lost too often.

    Example:
        >>> attempt = Attempt(number=1)
        >>> attempt.of(client=4)
        3
        >>> attempt.begin_again(client=4)
        True
        >>> attempt.of(client=4)  # by a larger number the trunk knows that the client has begun again
        4
    """

    number: int = 0
    excluded: frozenset[int] = frozenset()
    _again: Counter[int] = field(default_factory=Counter)

    def of(self, client: int) -> int:
        """Returns the number of the attempt in a client's steps.

        The number grows with each restart of the client, and with each attempt at the round.
        """
        # A client begins at most `TRIES` times in an attempt, so that two attempts share no number.
        return self.number * TRIES + self._again[client]

    def begin_again(self, client: int) -> bool:
        """Counts a restart of a client. Returns False if the client has no try left."""
        if self._again[client] >= TRIES - 1:
            return False
        self._again[client] += 1
        return True
