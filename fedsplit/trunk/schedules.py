"""Schedules of the trunk (`--trunk.schedule`): rules by which the steps of clients update the trunk's adapter.

Both sides of the wire read the schedule: the client before a packet is sent, the trunk before a packet is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rule by which clients share the trunk.

    Attributes:
        sees: Snapshot of the adapter for the computation of a step, in words.
        learns: True if the trunk's adapter is trained.
        returns_gradient: True if clients send gradients up and get gradients down.
        gathers: True if the steps of all active clients are computed as one batch.
        sums: True if gradients are summed until a barrier, before one step of the optimiser.
        personal: True if each client has a separate adapter and optimiser state. The strategy aggregates the adapters.
        deterministic: True if the result does not depend on the order of arrival of steps.

    Example:
        >>> SCHEDULES["frozen"].expects_backward(wants_gradient=True)
        True
        >>> SCHEDULES["frozen"].expects_backward(wants_gradient=False)  # nobody would learn from it
        False
    """

    sees: str
    learns: bool = True
    returns_gradient: bool = True
    gathers: bool = False
    sums: bool = False
    personal: bool = False
    deterministic: bool = False

    def expects_backward(self, wants_gradient: bool) -> bool:
        """Returns True if a backward follows a training forward.

        Args:
            wants_gradient: True if the client's bottom can use a gradient.
        """
        return self.returns_gradient and (self.learns or wants_gradient)


SCHEDULES: Mapping[str, Schedule] = {
    # SplitFed v2 (2004.12088), SplitLoRA (2407.00952).
    "shared": Schedule(sees="the newest snapshot when its forward began; others may step before its backward"),
    "batched": Schedule(sees="the newest snapshot, the same for all that are gathered", gathers=True),
    "accumulate": Schedule(sees="the snapshot at the last barrier", sums=True),
    # SplitFed v1 (2004.12088).
    "copies": Schedule(sees="its client's snapshot after the step before", personal=True, deterministic=True),
    "frozen": Schedule(sees="the first snapshot, always", learns=False, deterministic=True),
    "forward-only": Schedule(
        sees="the first snapshot, always", learns=False, returns_gradient=False, deterministic=True
    ),
}


def is_deterministic(name: str, every: int) -> bool:
    """Returns True if a schedule gives the same result for every order of arrival.

    Args:
        name: Name of a schedule in `SCHEDULES`.
        every: Steps between two barriers; 0 for the whole round. For 0, all gradients of a round are computed with one
            snapshot, and summed client by client.

    Example:
        >>> is_deterministic("accumulate", every=0), is_deterministic("accumulate", every=4)
        (True, False)
    """
    return SCHEDULES[name].deterministic or (SCHEDULES[name].sums and every == 0)
