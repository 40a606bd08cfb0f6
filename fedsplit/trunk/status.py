"""Reports of a trunk: bytes on the wire, events of a round, and the state of the process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Bytes:
    """Bytes of tensors on the wire for one purpose.

    Attributes:
        up: Bytes from clients to the trunk.
        down: Bytes from the trunk to clients.
    """

    up: int = 0
    down: int = 0


@dataclass
class Traffic:
    """Bytes of all tensors that crossed, by purpose.

    Attributes:
        activation: Hidden states of training steps, with their masks.
        gradient: Gradients of training steps, with norms and coefficients for clipping.
        evaluation_activation: Hidden states of evaluations.
        repeated: Repeated requests and the repeated answers.
        prompt: Hidden states of prompts for generated text.
        token: Hidden states of generated tokens.

    Example:
        >>> traffic = Traffic()
        >>> traffic.activation.up += 1024
        >>> traffic.document()
        {'activation_up': 1024}
    """

    activation: Bytes = field(default_factory=Bytes)
    gradient: Bytes = field(default_factory=Bytes)
    evaluation_activation: Bytes = field(default_factory=Bytes)
    repeated: Bytes = field(default_factory=Bytes)
    prompt: Bytes = field(default_factory=Bytes)
    token: Bytes = field(default_factory=Bytes)

    def copy(self) -> Traffic:
        """Returns a copy of the counts. Later traffic does not change the copy."""
        return copy.deepcopy(self)

    def document(self) -> dict[str, int]:
        """Returns the counts above zero by purpose and direction, such as "activation_up", for result files."""
        counts = {}
        for purpose, crossed in vars(self).items():
            counts[f"{purpose}_up"] = crossed.up
            counts[f"{purpose}_down"] = crossed.down
        return {name: count for name, count in counts.items() if count}


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
