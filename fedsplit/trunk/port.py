"""The trunk port: all requests of clients, the loop over rounds, evaluation and generation to a trunk.

Packets carry the steps of clients, and control messages carry everything else. A door leads to a trunk, such as a Ray
actor (`fedsplit.trunk.actor`) or an object in the same process (`fedsplit.trunk.local`). A door implements `send` and
`control`. All further methods are written once, in `TrunkPort`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from fedsplit.lowrank import LowRank
from fedsplit.network.trace import Crossing
from fedsplit.trunk.copies import Copy, Start
from fedsplit.trunk.status import RoundCounts, TrunkStatus
from fedsplit.updates import Adapters
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer

Reply = TypeVar("Reply")
Key = TypeVar("Key")
Value = TypeVar("Value")

CODEC = "codec/"
"""Prefix of the codec's state among the moments."""


class Control(Generic[Reply]):
    """A control message. The type parameter is the type of the reply.

    A trunk carries messages out one by one, between two steps, after all earlier packets and messages.
    """


@dataclass(frozen=True)
class BeginGroup(Control[None]):
    """Begins a group of clients that train together. Until the round ends, training of further clients is refused.

    Attributes:
        clients: The clients, in the order of the turns.
    """

    clients: tuple[int, ...]


@dataclass(frozen=True)
class Leave(Control[None]):
    """Ends the round and the sessions of a client that has finished or is dead.

    Attributes:
        client: Number of the client.
    """

    client: int


@dataclass(frozen=True)
class EndRound(Control[RoundCounts]):
    """Ends the round for all clients, and asks for the counts of the round.

    Attributes:
        finished: Clients with a round that counts.
    """

    finished: tuple[int, ...]


@dataclass(frozen=True)
class AssignCopies(Control[None]):
    """Sets, under `copies`, the adapters of clients for the beginning of a round.

    Attributes:
        starts: Starts by client. A client without a start begins with the shared adapter.
    """

    starts: Mapping[int, Start]


@dataclass(frozen=True)
class AssignAgain(Control[None]):
    """Sets, under `copies`, the adapter of a client that repeats the round.

    Attributes:
        client: Number of the client. Steps of an earlier attempt at the round no longer count.
        start: Start of the client's copy.
    """

    client: int
    start: Start


@dataclass(frozen=True)
class ReadCopies(Control[dict[int, Copy]]):
    """Asks, under `copies`, for the adapters of some clients at the end of the round.

    Attributes:
        clients: The clients. A client without a copy is missing in the reply.
    """

    clients: tuple[int, ...]


@dataclass(frozen=True)
class ReadAdapter(Control[Adapters]):
    """Asks for the shared adapter."""


@dataclass(frozen=True)
class WriteAdapter(Control[None]):
    """Replaces the shared adapter and all copies.

    Attributes:
        tensors: Shared adapter by exported name.
        personal: Personal adapters by client, for evaluations by these clients.
    """

    tensors: Mapping[str, Tensor]
    personal: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fold(Control[None]):
    """Adds matrices to the base weights. All decoding sessions end.

    Attributes:
        changes: Matrices by layer. Layers of bottom and top are ignored.
    """

    changes: Mapping[str, LowRank]


@dataclass(frozen=True)
class Unfold(Control[None]):
    """Sets the base weights back to the values at the last `Commit`. All decoding sessions end."""


@dataclass(frozen=True)
class Commit(Control[None]):
    """Makes changes of base weights final. A later `Unfold` does not undo the changes."""


@dataclass(frozen=True)
class ReadMoments(Control[dict[str, Tensor]]):
    """Asks for the states of the optimisers and of the codec."""


@dataclass(frozen=True)
class Restore(Control[None]):
    """Sets the shared adapter, the optimisers and the codec to earlier replies to `ReadAdapter` and `ReadMoments`.

    Attributes:
        tensors: Shared adapter by exported name.
        moments: States of the optimisers and of the codec.
    """

    tensors: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


@dataclass(frozen=True)
class MeasureStep(Control[float]):
    """Asks for the seconds that a step of one client takes: a forward and a backward. The adapter stays as it is."""


@dataclass(frozen=True)
class TakeTrace(Control[tuple[Crossing, ...]]):
    """Asks for the messages that crossed since the last time, for a virtual clock. The trunk forgets them."""


@dataclass(frozen=True)
class ReadStatus(Control[TrunkStatus]):
    """Asks for the state of the trunk and of the trunk's process."""


class TrunkPort(Protocol):
    """A trunk behind a door.

    Every method raises `fedsplit.wire.transport.TrunkLost` if the trunk is gone. An exception of the trunk is raised
    from the method that caused the exception.

    Example:
        >>> from fedsplit.trunk.status import TrunkStatus, Traffic
        >>> class OneReply(TrunkPort):  # a door to a trunk that always reports the same status
        ...     def send(self, packet):
        ...         return lambda: packet
        ...     def control(self, message):
        ...         return TrunkStatus("first", Traffic(), 0, 0, 0, 0, {"total": 96, "trainable": 8})
        >>> OneReply().status().parameters["trainable"]
        8
    """

    @abstractmethod
    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet without waiting, and returns a function that waits for the answer.

        The returned function raises a `RefusedStep` if the trunk must not serve the packet.
        """

    @abstractmethod
    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message, and waits for the reply."""

    def begin(self, group: Sequence[int]) -> None:
        """Makes clients a group that trains together, in the order of the turns; see `BeginGroup`."""
        self.control(BeginGroup(tuple(group)))

    def leave(self, client: int) -> None:
        """Ends the round of a client that has finished or is dead."""
        self.control(Leave(client))

    def end_round(self, finished: Sequence[int]) -> RoundCounts:
        """Ends the round for all clients. Only rounds of clients in `finished` count."""
        return self.control(EndRound(tuple(finished)))

    def assign(self, starts: Mapping[int, Start]) -> None:
        """Sets, under `copies`, the adapters of clients for the beginning of a round."""
        self.control(AssignCopies(dict(starts)))

    def assign_again(self, client: int, start: Start) -> None:
        """Sets, under `copies`, the adapter of a client that repeats the round."""
        self.control(AssignAgain(client, start))

    def copies(self, clients: Iterable[int]) -> dict[int, Copy]:
        """Returns, under `copies`, the adapters of some clients at the end of the round."""
        return self.control(ReadCopies(tuple(clients)))

    def read(self) -> Adapters:
        """Returns the shared adapter."""
        return self.control(ReadAdapter())

    def write(self, tensors: Mapping[str, Tensor], personal: Mapping[int, Mapping[str, Tensor]] | None = None) -> None:
        """Replaces the shared adapter, all copies, and the personal adapters of clients."""
        self.control(WriteAdapter(dict(tensors), dict(personal or {})))

    def fold(self, changes: Mapping[str, LowRank]) -> None:
        """Adds matrices to the base weights. Until the next `commit`, `unfold` undoes the change."""
        self.control(Fold(dict(changes)))

    def unfold(self) -> None:
        """Sets the base weights back to the values at the last `commit`."""
        self.control(Unfold())

    def commit(self) -> None:
        """Makes changes of base weights final."""
        self.control(Commit())

    def moments(self) -> dict[str, Tensor]:
        """Returns the states of the optimisers and of the codec."""
        return self.control(ReadMoments())

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Sets the shared adapter, the optimisers and the codec to earlier results of `read` and `moments`."""
        self.control(Restore(dict(tensors), dict(moments)))

    def measure_step(self) -> float:
        """Returns the seconds that a forward and a backward of the largest batch take."""
        return self.control(MeasureStep())

    def take_trace(self) -> tuple[Crossing, ...]:
        """Returns the messages that crossed since the last call; none without a virtual clock."""
        return self.control(TakeTrace())

    def status(self) -> TrunkStatus:
        """Returns the state of the trunk and of the trunk's process."""
        return self.control(ReadStatus())


def union(parts: Iterable[Mapping[Key, Value]]) -> dict[Key, Value]:
    """Returns one dict with the entries of several replies. Of equal names, the last reply counts.

    Example:
        >>> union([{"a": 1, "b": 2}, {"b": 3}])
        {'a': 1, 'b': 3}
    """
    joined: dict[Key, Value] = {}
    for part in parts:
        joined |= part
    return joined
