"""A link that several flows share by max-min fairness: nobody can get more without taking from somebody with less."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import simpy


def fair_rates(limits: Sequence[float], capacity: float) -> list[float]:
    """Returns the max-min fair rates of flows through one link (progressive filling).

    All rates rise together. A flow at its own limit stops, and the rest of the capacity is divided among the others.

    Args:
        limits: Largest rate of each flow, in bytes a second, such as the bandwidth of its client.
        capacity: Bandwidth of the shared link, in bytes a second.

    Example:
        >>> fair_rates([1.0, 8.0, 8.0], capacity=9.0)
        [1.0, 4.0, 4.0]
    """
    level = _level(sorted(limits), capacity)
    return [min(limit, level) for limit in limits]


def _level(ordered: Sequence[float], capacity: float) -> float:
    """Returns the rate up to which all flows rise; a flow with a smaller limit stops there.

    Args:
        ordered: Largest rate of each flow, the smallest first.
        capacity: Bandwidth of the shared link.
    """
    left = capacity
    for place, limit in enumerate(ordered):
        share = left / (len(ordered) - place)
        if limit >= share:  # so do all that follow
            return share
        left -= limit
    return math.inf  # the link has room for all


@dataclass(eq=False)
class _Flow:
    """Bytes on their way through a shared link.

    Attributes:
        left: Bytes that have not passed yet.
        limit: Largest rate of the flow, in bytes a second.
        done: Event of the last byte.
        rate: Present rate, in bytes a second.
    """

    left: float
    limit: float
    done: simpy.Event
    rate: float = 0.0


class SharedLink:
    """One direction of the trunk's link, on a virtual clock. The rates of all flows change as flows begin and end."""

    def __init__(self, env: simpy.Environment, capacity: float, sum_of_limits: float) -> None:
        """Starts without flows.

        Args:
            env: Environment with the virtual clock.
            capacity: Bandwidth in bytes a second.
            sum_of_limits: Sum of the limits of all flows that there may be at the same time, in bytes a second.
        """
        self._env = env
        self._capacity = capacity
        # Flows that cannot fill the link do not slow each other, and need no bookkeeping.
        self._has_room_for_all = sum_of_limits <= capacity
        self._flows: list[_Flow] = []
        self._changed_at = 0.0
        self._plan = 0

    def send(self, nbytes: float, limit: float) -> simpy.Event:
        """Begins a flow, and returns the event of its last byte.

        Args:
            nbytes: Bytes of the flow.
            limit: Largest rate of the flow, in bytes a second.
        """
        if self._has_room_for_all:
            return self._env.timeout(nbytes / limit)
        # Before the flow begins: what has passed so far has passed at the old rates.
        self._move()
        flow = _Flow(nbytes, limit, self._env.event())
        self._flows.append(flow)
        self._replan()
        return flow.done

    def _move(self) -> None:
        """Lets all flows go on from the last change to the present."""
        seconds = self._env.now - self._changed_at
        self._changed_at = self._env.now
        for flow in self._flows:
            flow.left -= flow.rate * seconds

    def _replan(self) -> None:
        """Divides the capacity among the present flows, and waits for the first of them to end."""
        self._plan += 1
        if not self._flows:
            return
        rates = fair_rates([flow.limit for flow in self._flows], self._capacity)
        for flow, rate in zip(self._flows, rates, strict=True):
            flow.rate = rate
        seconds = [flow.left / flow.rate for flow in self._flows]
        soonest = max(0.0, min(seconds))  # rounding may leave less than nothing
        ending = {flow for flow, own in zip(self._flows, seconds, strict=True) if own <= soonest}
        plan = self._plan

        def end(_: simpy.Event) -> None:
            if plan == self._plan:  # otherwise a flow has begun meanwhile, and another plan holds
                self._end(ending)

        timer = self._env.timeout(soonest)
        assert timer.callbacks is not None
        timer.callbacks.append(end)

    def _end(self, ending: Collection[_Flow]) -> None:
        """Ends flows whose last byte has passed."""
        self._move()
        ended = [flow for flow in self._flows if flow in ending]  # in the order of the flows, not of a set
        self._flows = [flow for flow in self._flows if flow not in ending]
        for flow in ended:
            flow.done.succeed()
        self._replan()
