"""Requests to the trunk that wait for their turn, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsplit.trunk.workers import BACKWARD, FORWARD
from fedsplit.wire.packets import Packet

Answer = Packet | Exception
"""Result of a request: a packet, or the error in place of a packet."""

Done = Callable[[Answer], None]
"""Takes the result of a request."""


@dataclass(eq=False)
class Request:
    """A packet that waits to be served.

    Two requests are equal only if they are the same object: a client may send equal packets.

    Attributes:
        packet: The packet.
        arrived: Time of its arrival.
        done: Function that takes the answer.
        repeats: True if the packet was served before. The earlier answer is then sent again.
    """

    packet: Packet
    arrived: float
    done: Done
    repeats: bool = False

    @property
    def client(self) -> int:
        """Number of the client."""
        return self.packet.key.client

    @property
    def is_backward(self) -> bool:
        """True for a gradient and for a clipping coefficient."""
        return "gradient" in self.packet.tensors or self.packet.clips

    @property
    def is_admission(self) -> bool:
        """True for an admission request."""
        return not self.packet.tensors

    @property
    def worker(self) -> str:
        """Name of the worker that computes the answer."""
        return BACKWARD if self.is_backward else FORWARD

    @property
    def is_step(self) -> bool:
        """True for a part of a training step."""
        return (self.is_backward or self.packet.training) and not self.is_admission

    @property
    def teaches(self) -> bool:
        """True for a part of a step that trains the trunk. Only the order of these parts changes results."""
        return self.is_step and self.packet.learns


def first_forwards(steps: Sequence[Request]) -> list[Request]:
    """Returns the earliest forward of each client."""
    forwards = [request for request in steps if not request.is_backward]
    forwards.sort(key=lambda request: request.packet.key.place)  # by key, not by arrival
    by_client: dict[int, Request] = {}
    for request in forwards:
        by_client.setdefault(request.client, request)
    return list(by_client.values())


def joinable(packet: Packet) -> tuple[bool, str]:
    """Returns a key: forwards with equal keys may be joined in a batch.

    The key tells whether the client wants gradients, and the type of the hidden states. Joined with hidden states of a
    wider type, bf16 values would be computed in the wider type, and the client's numbers would depend on its company.
    """
    hidden = packet.tensors.get("hidden")
    return packet.wants_gradient, hidden.dtype if hidden else ""
