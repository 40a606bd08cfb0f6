"""The switch `--trunk.schedule`: whose steps update the trunk's adapter, when, and what they see of it.

Both sides of the wire read it: the client to know what to send, the trunk to know what to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How clients share the trunk.

    Attributes:
        sees: Which version of the adapter a step is computed with, in words.
        learns: The trunk's adapter is trained.
        returns_gradient: Clients send gradients up and get gradients down.
        gathers: Steps of all clients that are active are computed as one.
        sums: Gradients are summed over a barrier before one step of the optimiser.
        personal: Each client has an adapter and moments of its own; the strategy aggregates them.
        deterministic: The result does not depend on the order in which steps arrive.
    """

    sees: str
    learns: bool = True
    returns_gradient: bool = True
    gathers: bool = False
    sums: bool = False
    personal: bool = False
    deterministic: bool = False

    def expects_backward(self, wants_gradient: bool) -> bool:
        """Whether a training forward is followed by a backward, given whether the client can use a gradient."""
        return self.returns_gradient and (self.learns or wants_gradient)


SCHEDULES: Mapping[str, Schedule] = {
    # SplitFed v2 (2004.12088), SplitLoRA (2407.00952).
    "shared": Schedule(sees="the newest version when its forward began; others may step before its backward"),
    "batched": Schedule(sees="one version for all that are gathered, the newest one", gathers=True),
    "accumulate": Schedule(sees="the version at the last barrier", sums=True),
    # SplitFed v1 (2004.12088).
    "copies": Schedule(sees="its client's own version, after its step before", personal=True, deterministic=True),
    "frozen": Schedule(sees="the version at the start, always", learns=False, deterministic=True),
    "forward-only": Schedule(
        sees="the version at the start, always", learns=False, returns_gradient=False, deterministic=True
    ),
}


def is_deterministic(name: str, every: int) -> bool:
    """Whether a schedule's result is the same in whatever order steps arrive.

    Args:
        name: One of `SCHEDULES`.
        every: Steps between two barriers; with 0, the whole round, all gradients are of one version, and summed
            client by client.
    """
    return SCHEDULES[name].deterministic or (SCHEDULES[name].sums and every == 0)
