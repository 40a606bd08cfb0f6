"""Reports of a trunk: bytes on the wire, events of a round, and the state of the process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Count:
    """A count in both directions, in all and by client.

    Attributes:
        up: Count from clients to the trunk.
        down: Count from the trunk to clients.
        up_by_client: The same as `up`, by the number of the client.
        down_by_client: The same as `down`, by the number of the client.

    Example:
        >>> count = Count()
        >>> count.add(client=3, up=1024, down=16)
        >>> count.up, count.up_by_client
        (1024, {3: 1024})
    """

    up: int = 0
    down: int = 0
    # Dictionaries of plain numbers: a status holds copies, and a federation may have thousands of clients.
    up_by_client: dict[int, int] = field(default_factory=dict, compare=False)
    down_by_client: dict[int, int] = field(default_factory=dict, compare=False)

    def add(self, client: int, up: int, down: int) -> None:
        """Adds counts of a client's request and of the answer."""
        self.up += up
        self.down += down
        self.up_by_client[client] = self.up_by_client.get(client, 0) + up
        self.down_by_client[client] = self.down_by_client.get(client, 0) + down

    def include(self, other: Count) -> None:
        """Adds a second count, client by client."""
        self.up += other.up
        self.down += other.down
        for client, count in other.up_by_client.items():
            self.up_by_client[client] = self.up_by_client.get(client, 0) + count
        for client, count in other.down_by_client.items():
            self.down_by_client[client] = self.down_by_client.get(client, 0) + count


@dataclass
class Bytes(Count):
    """Bytes of tensors on the wire for one purpose. The counts of the class itself are payload: the arrays of tensors.

    Attributes:
        framing: Bytes around the arrays: headers and lengths, as a frame on a socket has them
            (`fedsplit.wire.frames.framing`). In one process they are counted, too, although nothing is framed there.
        packets: Number of packets.

    Example:
        >>> crossed = Bytes()
        >>> crossed.add(client=3, up=1024, down=16)
        >>> crossed.packets.add(client=3, up=1, down=1)
        >>> crossed.up, crossed.packets.up
        (1024, 1)
    """

    framing: Count = field(default_factory=Count, compare=False)
    packets: Count = field(default_factory=Count, compare=False)

    def counts(self) -> dict[str, Count]:
        """Returns the counts of payload, framing and packets, by the prefix of their names in documents."""
        return {"": self, FRAMING: self.framing, PACKETS: self.packets}

    def include(self, other: Count) -> None:
        """Adds second counts, client by client."""
        super().include(other)
        if isinstance(other, Bytes):
            self.framing.include(other.framing)
            self.packets.include(other.packets)

    def copy(self) -> Bytes:
        """Returns an independent copy."""
        return Bytes() + self

    def __add__(self, other: Bytes) -> Bytes:
        """Returns the sum of two counts, client by client."""
        total = Bytes()
        total.include(self)
        total.include(other)
        return total


FRAMING = "framing."
"""Prefix of the names of bytes around the arrays, in documents."""

PACKETS = "packets."
"""Prefix of the names of numbers of packets, in documents."""


@dataclass
class Traffic:
    """Bytes of all tensors that crossed, by purpose.

    Attributes:
        activation: Hidden states of training steps, with their masks.
        gradient: Gradients of training steps, with norms and coefficients for clipping.
        evaluation_activation: Hidden states of evaluations.
        reference: Hidden states of the base model, for objectives and metrics that compare with it.
        repeated: Repeated requests and the repeated answers.
        prompt: Hidden states of prompts for generated text.
        token: Hidden states of generated tokens.
        between_stages: All tensors between the stages of a trunk; up is towards the top of the model.

    Example:
        >>> traffic = Traffic()
        >>> traffic.activation.up += 1024
        >>> traffic.document()
        {'activation_up': 1024}
    """

    activation: Bytes = field(default_factory=Bytes)
    gradient: Bytes = field(default_factory=Bytes)
    evaluation_activation: Bytes = field(default_factory=Bytes)
    reference: Bytes = field(default_factory=Bytes)
    repeated: Bytes = field(default_factory=Bytes)
    prompt: Bytes = field(default_factory=Bytes)
    token: Bytes = field(default_factory=Bytes)
    between_stages: Bytes = field(default_factory=Bytes)

    def copy(self) -> Traffic:
        """Returns a copy of the counts. Later traffic does not change the copy."""
        return Traffic(**{purpose: crossed.copy() for purpose, crossed in vars(self).items()})

    def document(self) -> dict[str, int]:
        """Returns the bytes of arrays above zero by purpose and direction, such as "activation_up"."""
        return {name: count for name, count in self.ledger().items() if "." not in name}

    def ledger(self) -> dict[str, int]:
        """Returns the counts above zero by purpose and direction, as `document` does, with framing and packets.

        Names of framing and of packets begin with `FRAMING` and `PACKETS`, such as "packets.activation_up".
        """
        counts = {}
        for purpose, crossed in vars(self).items():
            for prefix, count in crossed.counts().items():
                counts[f"{prefix}{purpose}_up"] = count.up
                counts[f"{prefix}{purpose}_down"] = count.down
        return {name: count for name, count in counts.items() if count}

    def by_client(self) -> dict[str, dict[int, int]]:
        """Returns the counts by purpose and direction, as `ledger` does, each by the number of the client.

        The bytes between stages belong to no client.

        Example:
            >>> traffic = Traffic()
            >>> traffic.gradient.add(client=3, up=8, down=4)
            >>> traffic.by_client()
            {'gradient_up': {3: 8}, 'gradient_down': {3: 4}}
        """
        counts = {}
        for purpose, crossed in vars(self).items():
            for prefix, count in crossed.counts().items():
                counts[f"{prefix}{purpose}_up"] = count.up_by_client
                counts[f"{prefix}{purpose}_down"] = count.down_by_client
        return {name: clients for name, clients in counts.items() if clients}


@dataclass
class RoundCounts:
    """Events at the trunk since the round began.

    Attributes:
        steps: Steps of the optimisers.
        forwards: Computed forwards. Steps of several clients in one batch count once.
        backwards: Computed backwards.
        recomputed: Forwards that were computed a second time, for the backward.
        waits: Requests that were told to ask again, since memory was short.
        late: Gradients that came too late to count.
        expired: Pending steps with an expired lease.
        abandoned: Steps that were pending at the end of the client's round.
        unusable: Steps at a barrier that were not made, since the adapter would not have been finite afterwards.
        sequences: Sequences whose gradients the trunk's adapter learned from.

    Example:
        >>> counts = RoundCounts(steps=3)
        >>> finished = counts.take()
        >>> finished.document(), counts.document()
        ({'steps': 3}, {})
    """

    steps: int = 0
    forwards: int = 0
    backwards: int = 0
    recomputed: int = 0
    waits: int = 0
    late: int = 0
    expired: int = 0
    abandoned: int = 0
    unusable: int = 0
    sequences: int = 0

    def take(self) -> RoundCounts:
        """Returns the counts, and resets them for the next round."""
        finished = dataclasses.replace(self)
        # In place, since forwards, backwards and the registry hold this object.
        for event in dataclasses.fields(self):
            setattr(self, event.name, 0)
        return finished

    def document(self) -> dict[str, int]:
        """Returns the counts above zero by name, for result files."""
        return {name: count for name, count in vars(self).items() if count}


@dataclass(frozen=True)
class TrunkStatus:
    """State of a trunk and of the trunk's process.

    Attributes:
        incarnation: Identity of this start of the trunk. Packets must carry the identity; a restart changes it.
        traffic: Bytes that have crossed so far.
        resident_memory: Resident memory of the process, in bytes.
        peak_memory: Largest resident memory of the process so far, in bytes.
        pending: Training steps that wait for a gradient or for a clipping coefficient.
        sessions: Open decoding sessions.
        parameters: Number of parameters, "total" and "trainable".
        least_memory: Smallest sufficient `--trunk.memory` in bytes; 0 without a budget.
        over_socket: Packets that came over a socket, local or TCP.
        process: Identity of the process.
    """

    incarnation: str
    traffic: Traffic
    resident_memory: int
    peak_memory: int
    pending: int
    sessions: int
    parameters: Mapping[str, int]
    least_memory: int = 0
    over_socket: int = 0
    process: str = ""


def with_joint_memory(status: TrunkStatus, statuses: Iterable[TrunkStatus]) -> TrunkStatus:
    """Returns a status with the memory of the processes of several trunks. Some trunks may share a process.

    Args:
        status: The status.
        statuses: Statuses of all trunks.

    Example:
        >>> one = TrunkStatus("a", Traffic(), 5, 7, 0, 0, {}, process="p")
        >>> with_joint_memory(one, [one, one, dataclasses.replace(one, process="q")]).peak_memory
        14
    """
    # Stages or replicas of one process all report the memory of the whole process.
    by_process = {one.process: one for one in statuses}
    resident = sum(one.resident_memory for one in by_process.values())
    peak = sum(one.peak_memory for one in by_process.values())
    return dataclasses.replace(status, resident_memory=resident, peak_memory=peak)
