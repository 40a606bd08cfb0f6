"""Flower's door to the clients: requests out over a grid, answers in."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from fedsplit.engines.away_nodes import AwayNodes
from fedsplit.federation import records
from fedsplit.federation.attempts import TRIES
from fedsplit.federation.clients import ClientNode, FederationFailed, Interrupted, RollCall
from fedsplit.federation.introductions import Introduction
from fedsplit.federation.messages import CLIENT_LOST, Answer, Briefing, Failure, Introduce, Request

POLL_SECONDS = 0.01
"""Time to sleep between two looks at what has arrived."""

LOOK_SECONDS = 0.2
"""Longest wait for a reply, between two looks at whether the run is stopped or hangs."""

LEAST_UNDER_WAY, UNDER_WAY_EACH = 16, 8
"""Messages that may be without a reply: at least, and for each process that plays clients.

Enough that no process waits for work while Flower, which looks every tenth of a second, takes up the next ones. All at
once would lie in memory at once, and for each node Flower looks through all of them.
"""


RESTART_SECONDS = 0.5
"""Time after which a process that was just being started again is asked once more."""

_RESTARTING = "The actor is restarting"
"""Words of Ray for a process that is being started again; the call was not made."""

_LOST_PROCESS = "<class 'ray.exceptions."
"""Beginning of what Flower says of a process that is gone; errors of a client's own have other classes."""


FOREIGN_DATA = "ForeignData"
"""Kind of the failure of a client whose node has other data for it than the driver. It ends the run."""


class Watch(Protocol):
    """Detects a run without progress, such as `fedsplit.engines.stalls.StallWatch`."""

    def heard(self) -> None:
        """Notes a sign of life."""
        ...

    def look(self) -> None:
        """Acts if there was no sign of life for too long."""
        ...

    def kill(self) -> None:
        """Kills the processes that play clients and have not answered."""
        ...


class FlowerClients:
    """The clients of a federation behind Flower's grid.

    Attributes:
        nodes: The clients by number; empty before `meet`.
        grid: Flower's grid.
    """

    def __init__(
        self,
        grid: Grid,
        stop: threading.Event,
        workers: int,
        stalls: Watch,
        patience: float = 600.0,
        wait: Callable[[float], object] | None = None,
        shipped: Callable[[], tuple[int, int]] = lambda: (0, 0),
        away_seconds: float = 0.0,
    ) -> None:
        """Starts without a client.

        Args:
            grid: Flower's connection to the nodes.
            stop: Ends the run at the next look for replies.
            workers: Processes that play the clients.
            stalls: Ends a wait without progress.
            patience: Seconds that the restart of a process may take.
            wait: Waits for a reply or until the seconds have passed. None if the grid cannot wait: the grid is then
                asked every `POLL_SECONDS`.
            shipped: Returns the bytes of clients' files sent to nodes, and the bytes received from nodes.
            away_seconds: Seconds for which requests wait for a node that is away. 0 if nodes never leave.
        """
        self._away = AwayNodes(away_seconds, lambda: grid.get_node_ids())
        self._shipped = shipped
        self._told = (0, 0)
        self._wait = wait
        self._patience = patience
        self.grid = grid
        self.nodes: list[ClientNode] = []
        self._stop = stop
        self._stalls = stalls
        self._workers = workers
        self._most = max(LEAST_UNDER_WAY, UNDER_WAY_EACH * workers)
        self._numbers: dict[int, int] = {}  # client by node
        self._waiting: dict[str, int] = {}  # node by id of a message without a reply

    def know(self, nodes: Iterable[ClientNode]) -> None:
        """Sets the clients by number."""
        self.nodes[:] = nodes
        self._numbers = {node.node: client for client, node in enumerate(self.nodes)}

    def meet(self, briefing: Briefing, count: int) -> Iterator[Introduction]:
        """Waits for all nodes, and asks each node for its client's introduction."""
        self._stalls.heard()
        while len(nodes := list(self.grid.get_node_ids())) < count:
            self._look()
            time.sleep(POLL_SECONDS)

        # Until the clients have said their numbers, each is known by the place of its node in the list.
        self.know(ClientNode(node, "") for node in nodes)
        roll = RollCall(count)
        places = list(range(len(nodes)))
        for tries_left in reversed(range(TRIES)):
            lost = []
            for answer in self.ask([Introduce(briefing, place) for place in places]):
                if isinstance(answer, Failure) and answer.kind == CLIENT_LOST and tries_left:
                    lost.append(answer.client)
                    continue
                # -1, since the order of the nodes says nothing about the clients: only the client knows its number.
                introduction = roll.hear(nodes[answer.client], replace(answer, client=-1))
                if introduction is not None:
                    yield introduction
            places = lost
        self.know(roll.nodes())

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        """Sends requests, and yields the answers as they arrive.

        A request to a process in the middle of a restart was not carried out, and is sent again.
        """
        under_way: dict[int, Request] = {}  # by client

        def message_of(request: Request) -> Message:
            under_way[request.client] = request  # to be sent again after a restart
            return records.to_message(request, self.nodes[request.client].node)

        started = time.monotonic()
        left: Iterable[Request] = requests
        while True:
            turned_away = []
            for node, message in self._replies(map(message_of, left), until):
                if node not in self._numbers:
                    raise FederationFailed(f"a reply came from node {node}, at which no client is")
                answer = records.to_answer(message, self._numbers[node])
                request = under_way.pop(self._numbers[node])
                if isinstance(answer, Failure):
                    if answer.kind == FOREIGN_DATA:
                        raise FederationFailed(answer.reason)
                    # A kind is the client's own word. A failure without one comes from Flower, which quotes Ray's
                    # error.
                    kind = CLIENT_LOST if _LOST_PROCESS in answer.reason and not answer.kind else answer.kind
                    if _RESTARTING in answer.reason and not answer.kind and time.monotonic() < started + self._patience:
                        turned_away.append(request)
                        continue
                    answer = replace(answer, kind=kind, reason=_reason(answer))
                yield answer
            if not turned_away:
                break
            time.sleep(RESTART_SECONDS)  # a request that is sent at once would be turned away again
            left = turned_away
        self._away.forget()
        if self._waiting:  # the deadline has passed
            self._stalls.kill()
            self.abandon()

    def abandon(self) -> None:
        """Waits for the replies to all running messages, and drops the replies."""
        for _ in self._replies([]):
            pass

    def take_shipped(self) -> dict[str, int]:
        """Returns the bytes of clients' files that have crossed between nodes since the last call."""
        before, self._told = self._told, self._shipped()
        down, up = (now - then for now, then in zip(self._told, before, strict=True))
        return {"client_files_down": down, "client_files_up": up}

    def _replies(
        self,
        messages: Iterable[Message],
        until: float | None = None,
    ) -> Iterator[tuple[int, Message]]:
        """Sends messages, some at a time, and yields the replies as they arrive, until a deadline.

        Yields:
            The node, and its reply. An error of Flower's comes from the SuperLink, and counts as the reply of the node
            that was asked.
        """
        left = iter(messages)
        self._stalls.heard()
        while until is None or time.monotonic() < until:
            self._look()
            self._send(left)
            if not self._waiting and not self._away.count:
                return
            for reply in self.grid.pull_messages(self._waiting) if self._waiting else ():
                self._stalls.heard()
                asked = self._waiting.pop(reply.metadata.reply_to_message_id)
                yield asked if reply.has_error() else reply.metadata.src_node_id, reply
            if self._waiting or self._away.count:
                self._pause(until)

    def _send(self, messages: Iterator[Message]) -> None:
        """Sends as many messages as there is room for, and those that have waited for a node."""
        room = self._most - len(self._waiting) - self._away.count
        while True:
            # As many as there are processes, so that these begin while further messages are made.
            new = list(itertools.islice(messages, min(room, self._workers)))
            if ready := self._away.take(new):
                self._push(ready)
            room -= len(new)
            if not new:
                return

    def _push(self, messages: Sequence[Message]) -> None:
        """Sends messages.

        Raises:
            FederationFailed: Flower does not take all of them.
        """
        ids = list(self.grid.push_messages(messages))
        if len(ids) != len(messages) or None in ids:
            raise FederationFailed("Flower's SuperLink does not take a message; it may be too large for the SuperLink")
        nodes = [message.metadata.dst_node_id for message in messages]
        self._waiting.update(zip(ids, nodes, strict=True))

    def _pause(self, until: float | None) -> None:
        """Waits for a reply, but not for long: the run may be stopped, and clients may hang."""
        if self._wait is None:
            time.sleep(POLL_SECONDS)
        else:
            left = LOOK_SECONDS if until is None else until - time.monotonic()
            self._wait(max(0.0, min(left, LOOK_SECONDS)))

    def _look(self) -> None:
        if self._stop.is_set():
            raise Interrupted
        self._stalls.look()


def _reason(failure: Failure) -> str:
    """Returns why a client failed, in a line: Flower sends `<class 'module.Error'>:<'text'>`, or a traceback."""
    text = failure.reason
    if failure.kind:
        return text
    match = re.fullmatch(r"<class '(?:\w+\.)*([\w()]+)'>:<'?(.*?)'?>", text, re.DOTALL)
    if match:
        text = match[2] if "\n" in match[2] else f"{match[1]}: {match[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no reason was given"
    return lines[-1].rpartition("ClientAppException occurred. Message: ")[2]
