"""Messages out and replies in: who has answered, who failed, and whether the run is to stop."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedsplit.events.emitter import Emit
from fedsplit.events.event_types import ClientFailed, Phase
from fedsplit.federation.aggregation import FederationFailed, Member
from fedsplit.federation.stalls import StallWatch

POLL_SECONDS = 0.01
"""How long to sleep between two looks at what has come in."""

LEAST_UNDER_WAY, UNDER_WAY_EACH = 16, 8
"""Messages that may be without a reply: at least, and for each process that plays clients.

Enough that nobody waits for work while Flower, which looks every tenth of a second, takes up the next ones. All at once
would lie in memory at once; and for each node Flower looks through all of them.
"""

Heard = Callable[[Message, int, int], None]
"""Told of each reply that is no error, with how many have come and how many are expected."""


class Interrupted(Exception):
    """The run was asked to stop."""


class NobodyAnswered(FederationFailed):
    """All that were asked failed."""


class Exchange:
    """The server's way to its clients.

    Attributes:
        members: The clients by number, once `know` has named them.
    """

    def __init__(
        self,
        stop: threading.Event,
        emit: Emit,
        lost: Callable[[int], None],
        workers: int,
        stalls: StallWatch,
    ) -> None:
        """Nobody is known yet.

        Args:
            stop: Ends the run at the next look at what has come in.
            emit: Reports the clients that fail.
            lost: Told of a client that failed, as soon as it is known.
            workers: Processes that play the clients.
            stalls: Ends a wait in which nothing goes on.
        """
        self._stop, self._emit, self._lost, self._stalls = stop, emit, lost, stalls
        self._most = max(LEAST_UNDER_WAY, UNDER_WAY_EACH * workers)
        self.members: list[Member] = []
        self._clients: dict[int, int] = {}  # by node

    def meet(self, grid: Grid, clients: int) -> list[int]:
        """Waits until so many nodes are there, and names them."""
        self._stalls.heard()
        while len(nodes := list(grid.get_node_ids())) < clients:
            self._go_on()
            time.sleep(POLL_SECONDS)
        return nodes

    def know(self, members: Sequence[Member]) -> None:
        """Sets the clients, by number; whoever holds `members` sees them, too."""
        self.members[:] = members
        self._clients = {member.node: client for client, member in enumerate(members)}

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Interrupted
        self._stalls.look()

    def send(
        self, grid: Grid, messages: Iterable[Message], expected: int, heard: Heard, phase: Phase, round: int
    ) -> list[Message]:
        """Sends messages, waits for all replies, and returns those that are no errors, as they came.

        Args:
            grid: Flower's way to the nodes.
            messages: One to each client that is asked; made when they are sent, some at a time.
            expected: How many there are.
            heard: Told of each reply.
            phase: Phase that a failure is reported with.
            round: Round that a failure is reported with.

        Raises:
            NobodyAnswered: There is no reply.
            Interrupted: The run was asked to stop.
        """
        left, waiting = iter(messages), set[str]()
        replies: list[Message] = []
        failures: list[Message] = []
        self._stalls.heard()
        while True:
            self._go_on()
            if more := list(itertools.islice(left, self._most - len(waiting))):
                waiting.update(grid.push_messages(more))
            if not waiting:
                break
            for reply in grid.pull_messages(waiting):
                self._stalls.heard()
                waiting.discard(reply.metadata.reply_to_message_id)
                (failures if reply.has_error() else replies).append(reply)
                if not reply.has_error():
                    heard(reply, len(replies) + len(failures), expected)
                elif (client := self.client_at(reply.metadata.src_node_id)) is not None:
                    self._lost(client)
            if waiting:
                time.sleep(POLL_SECONDS)
        for failure in failures:
            client = self.client_at(failure.metadata.src_node_id)
            name = "a client" if client is None else self.members[client].name
            reason = _reason(failure.error.reason)
            self._emit(ClientFailed(round=round, phase=phase, client=client, client_name=name, reason=reason))
        if not replies:
            reason = _reason(failures[0].error.reason) if failures else "nobody was asked"
            raise NobodyAnswered(f"no client answered: {reason}")
        return replies

    def ask_all(self, grid: Grid, messages: Iterable[Message], heard: Heard, phase: Phase, round: int) -> list[Message]:
        """Sends a message to each client; returns the replies in the order of the clients. As for `send`."""
        replies = self.send(grid, messages, len(self.members), heard, phase, round)
        return sorted(replies, key=self.number_of)

    def client_at(self, node: int) -> int | None:
        """Returns the number of the client at a node; None where there is no client."""
        return self._clients.get(node)

    def number_of(self, reply: Message) -> int:
        """The number of the client that a reply is from: that of its node, whatever it says of itself.

        Raises:
            FederationFailed: No client is at that node.
        """
        if (client := self.client_at(reply.metadata.src_node_id)) is None:
            raise FederationFailed(f"a reply came from node {reply.metadata.src_node_id}, at which no client is")
        return client

    def name(self, client: int) -> str:
        """A client's number and name."""
        return f"client {client} ({self.members[client].name})"


def _reason(text: str | None) -> str:
    """Why a client failed, in a line: Flower sends `<class 'module.Error'>:<'text'>`, or a traceback."""
    if match := re.fullmatch(r"<class '(?:\w+\.)*([\w()]+)'>:<'?(.*?)'?>", text or "", re.DOTALL):
        text = match[2] if "\n" in match[2] else f"{match[1]}: {match[2]}"
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1].rpartition("ClientAppException occurred. Message: ")[2] if lines else "no reason was given"
