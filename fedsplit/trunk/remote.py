"""A trunk in a process of its own, behind gRPC: the port by which a federation and its clients use the trunk."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from fedsplit.settings.config import Config
from fedsplit.trunk.control_bytes import message_as_bytes, reply_from_bytes
from fedsplit.trunk.port import Control, Leave, Reply, TrunkPort
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun, Terms
from fedsplit.wire.grpc_calls import RefusedByServer
from fedsplit.wire.packets import Packet
from fedsplit.wire.steps import ForeignStep
from fedsplit.wire.tls import NotTrusted
from fedsplit.wire.transport import PendingAnswer, TrunkLost, Unanswered

MOST_LINES = 4
"""Connections that a process with many clients keeps. It plays few clients at once, and a server has a limit."""


class Line(Protocol):
    """A connection to a server: a `fedsplit.wire.grpc_client.GrpcClient`, or one in a test."""

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting, and returns a function that waits for the answer."""
        ...

    def forget(self) -> None:
        """Drops the answers to all packets sent so far."""
        ...

    def control(self, request: bytes) -> bytes:
        """Sends a control request, and waits for the reply."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


Dial = Callable[[int | None], Line]
"""Returns a connection as a client by its number, or as the operator of the federation for None."""


@contextlib.contextmanager
def losses() -> Iterator[None]:
    """Turns the errors of a trunk that does not serve the run any more into `TrunkLost`.

    A trunk that was started again knows no run, and may have a new token. Whoever began the run begins it again.
    """
    try:
        yield
    except (ForeignStep, NotTrusted, RefusedByServer, Unanswered) as error:
        raise TrunkLost(f"the trunk does not serve the run any more ({error})") from error


def begin_run(dial: Dial, terms: Terms, owner: str = "") -> Begun:
    """Asks a trunk to begin a run.

    Args:
        dial: Connects to the trunk's server.
        terms: Terms of the run.
        owner: Identity of the run for its operator; see `BeginRun`.

    Returns:
        The name and the incarnation of the run, or the reason why no run has begun.

    Raises:
        TrunkLost: The server cannot be reached.
        NotTrusted, RefusedByServer: The server does not accept the caller.
    """
    with contextlib.closing(dial(None)) as line:
        begun: Begun = reply_from_bytes(BeginRun, line.control(message_as_bytes(BeginRun(terms, owner))))
    return begun


def finish_run(dial: Dial, run: str) -> None:
    """Tells a trunk that a run is over. Does nothing if the trunk is gone: it has no run then.

    Args:
        dial: Connects to the trunk's server, with little patience.
        run: Name of the run.
    """
    with contextlib.suppress(TrunkLost), losses(), contextlib.closing(dial(None)) as line:
        reply_from_bytes(FinishRun, line.control(message_as_bytes(FinishRun(), run)))


class RemoteTrunk(TrunkPort):
    """A run at a trunk in another process. Any thread may call.

    Every client has a connection of its own, since the server knows a client by the connection's certificate.

    Attributes:
        run: Name of the run at the trunk.
    """

    def __init__(
        self,
        run: str,
        dial: Dial,
        is_operator: bool,
        most_lines: int = MOST_LINES,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """Connects at the first request.

        Args:
            run: Name of the run at the trunk.
            dial: Connects to the trunk's server.
            is_operator: True for the federation. A client may send packets only.
            most_lines: Connections of clients that are kept.
            finish: Tells the trunk that the run is over; called once, by `kill`.
        """
        self._finish = finish
        self.run = run
        self._dial = dial
        self._is_operator = is_operator
        self._most_lines = most_lines
        self._guard = threading.Lock()
        self._lines: OrderedDict[int, Line] = OrderedDict()  # by client, the last used one at the end
        self._operator: Line | None = None

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, and returns a function that waits for the answer."""
        with losses(), self._guard:  # one thread at a time may use a connection
            answer = self._line_of(packet.key.client).send(packet)

        def wait() -> Packet:
            with losses():
                return answer()

        return wait

    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message, and waits for the reply. A client's message is left to the federation.

        Raises:
            TrunkLost: The trunk is gone, or does not serve the run any more.
            TypeError: A client sends another message than `Leave`.
        """
        if isinstance(message, Leave):
            self._forget(message.client)
        if not self._is_operator:
            return self._left_to_the_federation(message)
        with losses():
            data = self._operators_line().control(message_as_bytes(message, self.run))
        reply: Reply = reply_from_bytes(type(message), data)
        return reply

    def weigh(self, config: Config) -> Config:
        """Returns the settings as they are: a trunk in another process has no replicas."""
        return config

    def nodes(self) -> list[str]:
        """Returns no nodes, since no process of the trunk belongs to the run's Ray."""
        return []

    def kill(self) -> None:
        """Ends the run and all connections. The trunk's process goes on, and may serve another run."""
        with self._guard:
            # Told once, though `kill` may be called again.
            finish = self._finish
            self._finish = lambda: None
            lines = list(self._lines.values())
            if self._operator:
                lines.append(self._operator)
            self._lines.clear()
            self._operator = None
        # Outside of the guard, since both wait for the server.
        finish()
        for line in lines:
            line.close()

    def _left_to_the_federation(self, message: Control[Reply]) -> Reply:
        """Does nothing for a client that leaves: the federation says so as the client's reply comes."""
        if not isinstance(message, Leave):
            raise TypeError(f"a client cannot send {type(message).__name__} to a trunk")
        nothing: Reply = None  # type: ignore[assignment]  # the reply to `Leave`
        return nothing

    def _line_of(self, client: int) -> Line:
        """Returns the connection of a client, a new one if there is none. Closes the connection unused for longest."""
        line = self._lines.get(client)
        if line is None:
            if len(self._lines) >= self._most_lines:
                _, unused = self._lines.popitem(last=False)
                unused.close()
            line = self._lines[client] = self._dial(client)
        self._lines.move_to_end(client)
        return line

    def _operators_line(self) -> Line:
        with self._guard:
            if self._operator is None:
                self._operator = self._dial(None)
            return self._operator

    def _forget(self, client: int) -> None:
        """Drops the answers that nobody waits for any more."""
        with self._guard:
            if client in self._lines:
                self._lines[client].forget()
