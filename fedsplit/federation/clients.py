"""The port to a federation's clients: the requests of the server, under any engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsplit.federation.introductions import Introduction, read_introduction
from fedsplit.federation.messages import Answer, Briefing, Failure, Request
from fedsplit.updates import RefusedUpdate


class FederationFailed(Exception):
    """The run cannot go on. The message is the reason."""


class Interrupted(Exception):
    """The run was asked to stop."""


@dataclass(frozen=True)
class ClientNode:
    """A client, from the view of the server.

    Attributes:
        node: Id of the node that plays the client in the run.
        name: Owner of the client's data.
        absent: Reason why the client takes no part in the run; empty for a client that takes part.
    """

    node: int
    name: str
    absent: str = ""


class Roster(Protocol):
    """The clients of a federation, from the view of a strategy."""

    @property
    def nodes(self) -> Sequence[ClientNode]:
        """The clients by number."""
        ...

    @property
    def grid(self) -> Any:
        """Flower's grid; None on an engine without Flower."""
        ...


class Clients(Protocol):
    """Connection to all clients of a federation."""

    @property
    def nodes(self) -> Sequence[ClientNode]:
        """The clients by number; empty before `meet`."""
        ...

    @property
    def grid(self) -> Any:
        """Flower's grid, for strategies of Flower's; None on an engine without Flower."""
        ...

    def meet(self, briefing: Briefing, count: int) -> Iterator[Introduction]:
        """Asks every client of a run for its introduction. `RollCall` decides which clients take part.

        Args:
            briefing: Facts of the run.
            count: Number of clients.

        Yields:
            Introductions in the order of arrival. After the last one, `nodes` lists all clients, and names the absent
            ones.

        Raises:
            FederationFailed: The run cannot go on.
            Interrupted: The run was asked to stop.
        """
        ...

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        """Sends requests, and yields the answers on arrival.

        Args:
            requests: At most one request to each client. An engine takes the next request once it has room.
            until: Deadline by `time.monotonic`; None for no deadline.

        Yields:
            One answer for each request, in any order. At the deadline, the work of late clients is ended, and no
            answer is yielded for them. For a lost process, the answer is a failure of the kind `CLIENT_LOST`.

        Raises:
            FederationFailed: The run cannot go on.
            Interrupted: The run was asked to stop.
        """
        ...

    def abandon(self) -> None:
        """Waits until all running requests have ended, and drops the answers.

        Raises:
            FederationFailed: The run cannot go on.
            Interrupted: The run was asked to stop.
        """
        ...

    def take_shipped(self) -> Mapping[str, int]:
        """Returns the bytes of clients' files that have crossed between nodes since the last call.

        The keys are "client_files_down" and "client_files_up".
        """
        ...


class RollCall:
    """Collects introductions. A client without a usable introduction is absent for the whole run.

    Example:
        >>> from fedsplit.federation.introductions import introduce
        >>> roll = RollCall(2)
        >>> roll.hear(70, introduce(Introduction(1, "bob", {}, {}))).name
        'bob'
        >>> roll.hear(60, Failure(0, "OSError", "its data cannot be read"))
        >>> roll.nodes()[0]
        ClientNode(node=60, name='client 0', absent='its data cannot be read')
    """

    def __init__(self, count: int) -> None:
        """Starts without an introduction.

        Args:
            count: Number of clients.
        """
        self._count = count
        self._found: dict[int, ClientNode] = {}  # by client
        self._claimed_twice: set[int] = set()
        self._spare: list[int] = []  # nodes without a usable introduction
        self._reasons: dict[int, str] = {}  # by client, where the client is known
        self._unattributed: list[str] = []

    def hear(self, node: int, answer: Answer) -> Introduction | None:
        """Takes the answer of a node.

        Args:
            node: Id of the node.
            answer: The answer. The client is -1 if the engine does not know the client's number.

        Returns:
            The introduction; None if it cannot be used.
        """
        try:
            introduction = self.read(answer)
        except RefusedUpdate as refused:
            self._spare.append(node)
            if answer.client in range(self._count):
                self._reasons[answer.client] = str(refused)
            else:
                self._unattributed.append(str(refused))
            return None
        self._found[introduction.client] = ClientNode(node, introduction.name)
        return introduction

    def read(self, answer: Answer) -> Introduction:
        """Returns a usable introduction.

        Raises:
            RefusedUpdate: The answer is a failure, or an introduction that cannot be used.
        """
        if isinstance(answer, Failure):
            raise RefusedUpdate(answer.reason)
        introduction = read_introduction(answer)
        client = introduction.client
        if client not in range(self._count):
            raise RefusedUpdate(f"a node says that it is client {client}, and there is none of that number")
        if client in self._found:
            self._claimed_twice.add(client)
            raise RefusedUpdate(f"two nodes say that they are client {client}")
        if client == 0 and not has_start(introduction):
            raise RefusedUpdate("it did not say what training starts from")
        return introduction

    def nodes(self) -> list[ClientNode]:
        """Returns the clients by number, after the answers of all nodes.

        If two nodes report the same number, nobody knows which is right, and the client is absent. An absent client
        gets one of the remaining nodes. If several clients are absent and reasons cannot be attributed, each client
        gets all reasons.
        """
        # Every client gets a node, absent or not, since Flower's strategies count and sample nodes.
        spare = [self._found[client].node for client in sorted(self._claimed_twice)] + self._spare
        shared = " or ".join(dict.fromkeys(self._unattributed)) or "it was not heard"
        nodes = []
        for client in range(self._count):
            if client in self._found and client not in self._claimed_twice:
                nodes.append(self._found[client])
                continue
            reason = self._reasons.get(client, shared)
            if client in self._claimed_twice:
                reason = f"two nodes say that they are client {client}"
            nodes.append(ClientNode(spare.pop(0) if spare else -1, f"client {client}", reason))
        return nodes


def has_start(introduction: Introduction) -> bool:
    """Returns True if an introduction holds the initial adapters."""
    return introduction.start.keys() == {"bottom", "top"}
