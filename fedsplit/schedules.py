"""The switch `--trunk.schedule`: who updates the trunk's adapter, and which gradients cross.

Both sides of the wire read it: the client to know what to send, the trunk to know what to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Who updates the trunk's adapter, and when.

    Attributes:
        learns: Each backward is followed by one step of the trunk's optimiser.
        returns_gradient: Clients send gradients up and get gradients down.
    """

    learns: bool
    returns_gradient: bool

    def expects_backward(self, wants_gradient: bool) -> bool:
        """Whether a training forward is followed by a backward, given whether the client can use a gradient."""
        return self.returns_gradient and (self.learns or wants_gradient)


SCHEDULES: Mapping[str, Schedule] = {
    "shared": Schedule(learns=True, returns_gradient=True),
    "frozen": Schedule(learns=False, returns_gradient=True),
    "forward-only": Schedule(learns=False, returns_gradient=False),
}
