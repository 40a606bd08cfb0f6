"""The relay of a stage: serves packets by the stage's own blocks, and passes them on to the stages above."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedsplit.trunk.requests import Answer, Done
from fedsplit.trunk.route import Way, way_of
from fedsplit.wire.packets import Packet
from fedsplit.wire.streams import PacketStream

MOST_STREAMS = 256
"""Most connections to the next stage. Clients beyond that share one; a packet server takes 512 in all."""

Submit = Callable[[Packet, Done], None]
"""Takes a packet, and a function that takes the answer."""


class Relay:
    """Passes packets on without waiting. Many threads may call all methods.

    Each client has a connection to the next stage, so that the packets of one client arrive in their order, and hardly
    any client waits behind another one.
    """

    def __init__(self, own: Submit, connect: Callable[[], PacketStream], learns: bool) -> None:
        """Starts without connections.

        Args:
            own: Serves a packet by the stage's own blocks.
            connect: Returns a new connection to the next stage.
            learns: True if the trunk's adapter is trained.
        """
        self._own = own
        self._connect = connect
        self._learns = learns
        self._streams: dict[int, PacketStream] = {}  # by place
        self._changing = threading.Lock()

    def submit(self, packet: Packet, done: Done) -> None:
        """Takes a packet in correct form, and a function that takes the answer."""
        way = way_of(packet, self._learns)
        self._ask(way, next(way), done)

    def _ask(self, way: Way, question: tuple[str, Packet], done: Done) -> None:
        """Has the next station of a way answer. No thread waits: the answer calls `_go_on`."""
        where, packet = question
        take = self._own if where == "own" else self._pass_on
        take(packet, lambda answer: self._go_on(way, answer, done))

    def _go_on(self, way: Way, answer: Answer, done: Done) -> None:
        """Gives an answer to a way, and asks the way's next question. At the end of the way, calls `done`."""
        if isinstance(answer, Exception):
            done(answer)
            return
        try:
            question = way.send(answer)
        except StopIteration as end:
            done(end.value)
        else:
            self._ask(way, question, done)

    def _pass_on(self, packet: Packet, done: Done) -> None:
        """Sends a packet to the next stage, over the connection of the packet's client."""
        place = packet.key.client % MOST_STREAMS
        with self._changing:
            # Within the lock: two packets of one client must not open two connections, or they could overtake each
            # other.
            stream = self._streams.get(place)
            if stream is None or not stream.is_open:
                try:
                    stream = self._connect()
                    self._streams[place] = stream
                except OSError as error:
                    done(ConnectionError(f"the next stage of the trunk cannot be reached: {error}"))
                    return
        stream.send(packet, done)

    def close(self) -> None:
        """Closes all connections. The next packet opens another one."""
        with self._changing:
            # Closed outside of the lock, which an answer that arrives meanwhile may need.
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            stream.close()
