"""The port to a federation's clients: what the loop over rounds asks of them, by whatever engine they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedsplit.federation.messages import Answer, Briefing, Failure, Request
from fedsplit.federation.replies import Introduction, read_introduction
from fedsplit.updates import RefusedUpdate


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
        absent: Reason why the client takes no part in the run; empty for one that introduced itself.
    """

    node: int
    name: str
    absent: str = ""


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
        """Finds the clients of a run, and has each introduce itself; `RollCall` tells who takes part.

        Args:
            briefing: Facts of the run.
            count: Number of clients.

        Yields:
            Introductions in the order in which they arrive. After the last one `nodes` is complete, and says which
            clients are absent.

        Raises:
            FederationFailed: Nothing goes on any more.
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


class RollCall:
    """Takes the introductions of clients; a client without a usable one is absent for the whole run.

    Example:
        >>> from fedsplit.federation.replies import introduce
        >>> roll = RollCall(2)
        >>> roll.hear(70, introduce(Introduction(1, "bob", {}, {}))).name
        'bob'
        >>> roll.hear(60, Failure(0, "OSError", "its data cannot be read"))
        >>> roll.nodes()[0]
        ClientNode(node=60, name='client 0', absent='its data cannot be read')
    """

    def __init__(self, count: int) -> None:
        """Has heard nobody.

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
            answer: The answer; its client is -1 where only the introduction tells it.

        Returns:
            The introduction; None where it cannot be used.
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
            RefusedUpdate: There is none; says why.
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
        """Returns the clients by number, once all nodes have been heard.

        Nobody knows which of two nodes with the same number is right, so that their client is absent. An absent client
        gets one of the nodes that are left. Where several are absent, and nobody knows which of them failed for which
        reason, each has all reasons.
        """
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
    """Returns True if an introduction says what training starts from."""
    return introduction.start.keys() == {"bottom", "top"}
