"""Seconds of a step and of a round on a stated link and on stated devices, and what limits them.

A step is played once over four resources: the client's device, its uplink, the trunk, and the client's downlink. Each
serves one thing at a time, in the order of `fedsplit.client.split_step`. So micro-batches of a batch overlap as they
do in a run.

A round takes as long as a client's own steps, or as long as the trunk's work for all clients, whichever is longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.network.profiles import Profile


@dataclass(frozen=True)
class StepCost:
    """Costs of one micro-batch.

    Attributes:
        bottom_forward: Seconds of the bottom's forward.
        trunk_forward: Seconds of the trunk's forward.
        top: Seconds of the top's forward and backward.
        trunk_backward: Seconds of the trunk's backward.
        bottom_backward: Seconds of the bottom's backward.
        activation_up: Bytes of hidden states to the trunk.
        activation_down: Bytes of hidden states to the client.
        gradient_up: Bytes of gradients to the trunk.
        gradient_down: Bytes of gradients to the client.
    """

    bottom_forward: float
    trunk_forward: float
    top: float
    trunk_backward: float
    bottom_backward: float
    activation_up: float
    activation_down: float
    gradient_up: float
    gradient_down: float

    @property
    def client(self) -> float:
        """Seconds at the client."""
        return self.bottom_forward + self.top + self.bottom_backward

    @property
    def trunk(self) -> float:
        """Seconds at the trunk."""
        return self.trunk_forward + self.trunk_backward


@dataclass(frozen=True)
class Link:
    """A client's line, as an estimate sees it: mean values.

    Attributes:
        up: Bytes a second to the trunk. Lost packets are sent again.
        down: Bytes a second to the client.
        delay: Seconds of a message on its way, without the time of its bytes.
    """

    up: float
    down: float
    delay: float

    @classmethod
    def of(cls, profile: Profile) -> Link:
        """Returns the mean of a profile.

        Example:
            >>> from fedsplit.network.profiles import PROFILES
            >>> Link.of(PROFILES["home"]).up
            1248750.0
        """
        arriving = 1 - profile.loss
        delay = (profile.rtt_ms / 2 + profile.jitter_ms / 2) / 1000
        return cls(profile.uplink_bytes * arriving, profile.downlink_bytes * arriving, delay)

    def seconds_up(self, nbytes: float) -> float:
        """Returns the seconds that a message occupies the uplink."""
        return nbytes / self.up

    def seconds_down(self, nbytes: float) -> float:
        """Returns the seconds that a message occupies the downlink."""
        return nbytes / self.down


@dataclass
class _Resource:
    """Something that serves one thing at a time.

    Attributes:
        free: Time from which the resource is free.
    """

    free: float = 0.0

    def serve(self, ready: float, seconds: float) -> float:
        """Serves something that is ready at a time, and returns the time at which it is done."""
        self.free = max(self.free, ready) + seconds
        return self.free


def step_seconds(cost: StepCost, micros: int, link: Link, batches: int = 1, messages: int = 0) -> float:
    """Returns the seconds of a step of a client that has the trunk for itself.

    Args:
        cost: Costs of one micro-batch.
        micros: Micro-batches of a batch.
        link: The client's line.
        batches: Batches of the step, one after the other.
        messages: Further pairs of small messages, such as those of clipping.

    Example:
        >>> cost = StepCost(1, 2, 3, 4, 5, 10, 10, 10, 10)
        >>> step_seconds(cost, 1, Link(10.0, 10.0, delay=0.5))  # 15 seconds of computing, 4 messages of 1.5 seconds
        21.0
    """
    return batches * _batch_seconds(cost, micros, link) + messages * 2 * link.delay


def _batch_seconds(cost: StepCost, micros: int, link: Link) -> float:
    """Returns the seconds of one batch."""
    client, uplink, trunk, downlink = (_Resource() for _ in range(4))

    def up(ready: float, nbytes: float) -> float:
        return uplink.serve(ready, link.seconds_up(nbytes)) + link.delay

    def down(ready: float, nbytes: float) -> float:
        return downlink.serve(ready, link.seconds_down(nbytes)) + link.delay

    sent = [client.serve(0.0, cost.bottom_forward) for _ in range(micros)]
    reached = [up(time, cost.activation_up) for time in sent]
    computed = [trunk.serve(time, cost.trunk_forward) for time in reached]
    arrived = [down(time, cost.activation_down) for time in computed]
    returned = [client.serve(time, cost.top) for time in arrived]
    if not cost.gradient_up:  # under forward-only, nothing goes back
        return max(returned)
    reached = [up(time, cost.gradient_up) for time in returned]
    computed = [trunk.serve(time, cost.trunk_backward) for time in reached]
    # An answer comes also where the client needs no gradient.
    arrived = [down(time, cost.gradient_down) for time in computed]
    return max(client.serve(time, cost.bottom_backward) for time in arrived)
