"""A connection to a packet server that hands each answer on as it comes, without a thread that waits for it."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

from fedsplit.wire import frames
from fedsplit.wire.packets import Packet
from fedsplit.wire.sockets import Address, Connected, PacketClient, connect
from fedsplit.wire.transport import PacketTransport, PendingAnswer, Unanswered, remembered

Done = Callable[[Packet | Exception], None]
"""Takes an answer, or the error in place of an answer."""


class PacketStream:
    """A connection whose packets are sent, and whose answers are read, by threads of its own. Thread-safe.

    Attributes:
        is_open: False once the connection is broken or closed.
    """

    def __init__(self, address: Address, connected: Connected | None = None) -> None:
        """Connects to a server.

        Args:
            address: Address of the server.
            connected: Result of `connect`; None to connect now.

        Raises:
            OSError: No server that this machine can reach listens at the address.
            NotTrusted: The server does not accept the certificate of this machine, or the other way round.
        """
        self.is_open = True
        self._socket, self._connection = connected or connect(address)
        self._outgoing: queue.SimpleQueue[tuple[Packet, Done] | None] = queue.SimpleQueue()
        self._waiting: dict[int, Done] = {}
        self._changing = threading.Lock()
        for work in (self._write, self._read):
            threading.Thread(target=work, name="stream", daemon=True).start()

    def send(self, packet: Packet, done: Done) -> None:
        """Sends a packet after all earlier packets.

        Args:
            packet: The packet.
            done: Called by a thread of the stream with the answer, or with an `Unanswered` if the connection breaks.
        """
        with self._changing:
            if self.is_open:
                # Within the lock: behind the None of `_break_off`, nobody would ever answer the packet.
                self._outgoing.put((packet, done))
                return
        done(Unanswered("the connection is closed"))

    def _write(self) -> None:
        """Sends packets in the order of the calls, until the connection breaks."""
        number = 0
        while (item := self._outgoing.get()) is not None:
            packet, done = item
            with self._changing:
                may_send = self.is_open
                if may_send:
                    self._waiting[number] = done  # before the packet is sent: the answer may come at once
            if may_send:
                try:
                    frames.send(self._connection, number, packet)
                except OSError as error:
                    self._break_off(str(error))
            else:
                done(Unanswered("the connection is closed"))
            number += 1
            del item, packet, done  # a packet must not stay in memory while the thread waits for the next one

    def _read(self) -> None:
        """Takes answers until the connection breaks."""
        try:
            while True:
                self._take_answer()
        except frames.BROKEN as error:
            self._break_off(str(error) or "the other side has hung up")

    def _take_answer(self) -> None:
        """Takes one answer. A loop in here would keep the last answer in memory while the thread waits."""
        number, answer = frames.receive(self._connection)
        with self._changing:
            done = self._waiting.pop(number, None)
        # Outside the lock, since `done` may send the next packet over this stream.
        if done is not None:
            done(answer)

    def close(self) -> None:
        """Hangs up. Packets without an answer get an `Unanswered`."""
        self._break_off("the connection was closed")

    def _break_off(self, reason: str) -> None:
        """Hangs up, and gives every packet without an answer the reason."""
        with self._changing:
            self.is_open = False
            waiting = list(self._waiting.values())
            self._waiting.clear()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads; `close` alone would not
        self._socket.close()
        self._outgoing.put(None)  # ends the thread that writes
        for done in waiting:
            done(Unanswered(reason))


class StreamClient:
    """A transport over a stream: the caller computes on while the bytes of a packet are on their way.

    Between machines a large packet takes milliseconds. On one machine a packet of any size is copied at once, and a
    further thread would cost more than it saves.
    """

    def __init__(self, stream: PacketStream) -> None:
        """Sends packets by a stream."""
        self._stream = stream

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet, as `PacketTransport.send` does. The packet's arrays must not change before the answer."""
        if not self._stream.is_open:
            raise Unanswered("the connection is closed")
        answers: queue.SimpleQueue[Packet | Exception] = queue.SimpleQueue()
        self._stream.send(packet, answers.put)
        return remembered(answers.get)

    def forget(self) -> None:
        """Does nothing, since an answer is dropped when nobody waits for the answer."""


def client_of(address: Address) -> PacketTransport:
    """Returns a transport to a server: over a stream if the server is on another machine.

    Raises:
        OSError: No server that this machine can reach listens at the address.
        NotTrusted: The server does not accept the certificate of this machine, or the other way round.
    """
    connected = connect(address)
    if connected[0].family == socket.AF_UNIX:
        return PacketClient(address, connected)
    return StreamClient(PacketStream(address, connected))
