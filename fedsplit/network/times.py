"""Where the virtual time of clients went."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

PLACES = ("client_compute", "wire_up", "others", "trunk_queue", "trunk_compute", "wire_down")
"""Where the time of a client goes: its own computing; messages up; waiting for other clients, at a barrier or for the
end of the round; waiting for the trunk, which serves others; the trunk's computing; messages down."""

PLACE_WORDS = {
    "client_compute": "clients computing",
    "wire_up": "sending up",
    "others": "waiting for others",
    "trunk_queue": "waiting for the trunk",
    "trunk_compute": "trunk computing",
    "wire_down": "receiving",
}
"""Places in words."""

STRAGGLER = 1.5
"""A client is a straggler if it arrives later than this multiple of the median arrival."""


@dataclass
class ClientTime:
    """Virtual seconds of one client, by place. The sum is the time that has passed for the client.

    Attributes:
        seconds: Seconds by place, as in `PLACES`.

    Example:
        >>> time = ClientTime()
        >>> time.add("wire_up", 1.5)
        >>> time.total
        1.5
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PLACES, 0.0))

    def add(self, place: str, seconds: float) -> None:
        """Adds seconds to a place."""
        self.seconds[place] += seconds

    def add_all(self, other: ClientTime) -> None:
        """Adds the seconds of another phase."""
        for place, seconds in other.seconds.items():
            self.seconds[place] += seconds

    @property
    def total(self) -> float:
        """Sum over all places."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class PhaseTime:
    """A phase of a round on the virtual clock.

    Attributes:
        arrivals: Seconds from the start of the phase until the client's answer is at the server, by client.
        spent: Where the time of each client went until then.
    """

    arrivals: Mapping[int, float]
    spent: Mapping[int, ClientTime]

    @property
    def end(self) -> float:
        """Seconds until the last answer; 0 without clients."""
        return max(self.arrivals.values(), default=0.0)


def stragglers_of(arrivals: Mapping[int, float]) -> list[int]:
    """Returns the clients that arrive much later than the median client, the latest first.

    Args:
        arrivals: Seconds until a client's answer is at the server, by client.

    Example:
        >>> stragglers_of({0: 1.0, 1: 1.1, 2: 9.0})
        [2]
    """
    # A client alone is the median itself.
    if len(arrivals) < 2:
        return []
    limit = STRAGGLER * statistics.median(arrivals.values())
    late = [client for client, seconds in arrivals.items() if seconds > limit]
    return sorted(late, key=lambda client: (-arrivals[client], client))
