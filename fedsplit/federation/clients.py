"""The port to a federation's clients: what the loop over rounds asks of them, by whatever engine they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsplit.federation.messages import Answer, Briefing, Request
from fedsplit.federation.replies import Introduction


class FederationFailed(Exception):
    """The run cannot go on; says why."""


class Interrupted(Exception):
    """The run was asked to stop."""


@dataclass(frozen=True)
class ClientNode:
    """A client as the server knows it.

    Attributes:
        node: Id of the node that plays the client in this run.
        name: Owner of the client's data.
    """

    node: int
    name: str


class Roster(Protocol):
    """The clients of a federation, as a strategy sees them."""

    @property
    def nodes(self) -> Sequence[ClientNode]:
        """The clients by number."""
        ...

    @property
    def grid(self) -> Any:
        """Flower's grid; None where no Flower runs."""
        ...


class Clients(Protocol):
    """Way to all clients of a federation."""

    @property
    def nodes(self) -> Sequence[ClientNode]:
        """The clients by number; empty before `meet`."""
        ...

    @property
    def grid(self) -> Any:
        """Flower's grid, for a strategy of Flower's that looks at it; None where no Flower runs."""
        ...

    def meet(self, briefing: Briefing, count: int) -> Iterator[Introduction]:
        """Finds the clients of a run, and has each introduce itself.

        Args:
            briefing: Facts of the run.
            count: Number of clients.

        Yields:
            Introductions in the order in which they arrive. After the last one `nodes` is complete.

        Raises:
            FederationFailed: A client could not load its parts, or two claim the same number.
            Interrupted: The run was asked to stop.
        """
        ...

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        """Sends requests, and yields the answers as they arrive.

        Args:
            requests: One to each client that is asked. An engine takes them one by one as it has room.
            until: Time by `time.monotonic` at which nobody is waited for any more; None to wait for all.

        Yields:
            One answer for each request, in any order; none for clients that are not waited for any more, whose work is
            ended. The answer of a client whose process was lost is a failure of the kind `CLIENT_LOST`.

        Raises:
            FederationFailed: Nothing goes on any more.
            Interrupted: The run was asked to stop.
        """
        ...

    def abandon(self) -> None:
        """Waits for all requests that are under way, and drops the answers.

        Raises:
            FederationFailed: Nothing goes on any more.
            Interrupted: The run was asked to stop.
        """
        ...


def check_introductions(introductions: Sequence[Introduction], count: int) -> None:
    """Makes sure that every client introduced itself once, and the first one sent what training starts from.

    Raises:
        FederationFailed: It is not so.
    """
    seen = set[int]()
    for introduction in introductions:
        client = introduction.client
        if client not in range(count) or client in seen:
            raise FederationFailed(f"two nodes say that they are client {client}, or there is none of that number")
        seen.add(client)
    if len(seen) < count:
        raise FederationFailed(f"only {len(seen)} of {count} clients could load their parts")
    first = next(introduction for introduction in introductions if introduction.client == 0)
    if first.start.keys() != {"bottom", "top"}:
        raise FederationFailed("the first client did not say what training starts from")
