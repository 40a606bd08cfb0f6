"""For whom there is room: what was promised, what is on its way, and whose graphs must go for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from fedsplit.trunk.flights import Flight
from fedsplit.trunk.learners import Withheld
from fedsplit.trunk.memory import Budget, Room
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import Steps

TRANSIT = 3
"""Times a packet's bytes that it takes while it arrives: in the transport's buffers, and as what is kept."""


class Admission:
    """Admits steps under a budget of memory, so that what they will bring has room, too.

    Where nothing else helps, it frees the graphs of pending flights, which are computed again then, and answers that
    are kept in case they are asked for once more.
    """

    def __init__(
        self, budget: Budget, steps: Steps[Flight | Withheld], lease: float, clock: Callable[[], float]
    ) -> None:
        """Nothing is promised yet.

        Args:
            budget: For resident memory.
            steps: Which are pending.
            lease: Seconds that a promise holds.
            clock: Seconds, always growing.
        """
        self._budget, self._steps, self._lease, self._clock = budget, steps, lease, clock
        self._promised: dict[StepKey, tuple[int, float]] = {}

    def has_promised(self, key: StepKey) -> bool:
        """Whether room is kept free for a step."""
        return key in self._promised

    def promise(self, key: StepKey, tokens: int, nbytes: int) -> bool:
        """Keeps room free for a step whose hidden states have not been sent, where there is any.

        Args:
            key: The step.
            tokens: B * T.
            nbytes: Of its hidden states.
        """
        if not self.make_room(tokens, self._bytes_to_come() + 2 * TRANSIT * nbytes):
            return False
        self._promised[key] = TRANSIT * nbytes, self._clock() + self._lease
        return True

    def redeem(self, keys: Iterable[StepKey]) -> None:
        """The hidden states of some steps have come."""
        for key in keys:
            self._promised.pop(key, None)

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead."""
        self._promised = {key: promise for key, promise in self._promised.items() if key.client != client}

    def expire(self) -> None:
        """Takes back promises whose lease has run out."""
        now = self._clock()
        self._promised = {key: promise for key, promise in self._promised.items() if promise[1] > now}

    def _bytes_to_come(self) -> int:
        """What is on its way, or may be at any time: hidden states that were promised room, and gradients."""
        hidden = sum(size for size, _ in self._promised.values())
        flights = {id(flight): flight for flight in self._flights()}.values()
        pending = ((key, tensor) for flight in flights for key, tensor in flight.inputs.items())
        return 2 * hidden + TRANSIT * sum(tensor.nbytes for key, tensor in pending if self._steps.is_pending(key))

    def _flights(self) -> list[Flight]:
        return [held for held in self._steps.pending() if isinstance(held, Flight)]

    def make_room(self, tokens: int, kept: float, own: Flight | None = None) -> bool:
        """Whether a step can be computed and so many bytes be kept; for that, others' graphs may have to go.

        Args:
            tokens: Of the step, B * T.
            kept: Bytes; below 0 where as many are there already.
            own: Whose graph stays.
        """
        if self._budget.fits(tokens, kept):
            return True
        graphs = [flight for flight in self._flights() if flight.output is not None and flight is not own]
        for flight in graphs:
            flight.output = None
            self._budget.freed()
        if not graphs and not len(self._steps) and not self._steps.drop_answers():
            return False
        self._budget.freed()
        return self._budget.fits(tokens, kept)

    def room(self, inputs: Sequence[Tensor]) -> tuple[Room, int]:
        """What may be kept of a flight, and for how many of its steps there is room.

        Args:
            inputs: Hidden states (B, T, D) by step.
        """
        if self._budget.limit is None:
            return "graph", len(inputs)
        count, to_come = len(inputs), self._bytes_to_come()
        while count:
            rows, length = sum(h.shape[0] for h in inputs[:count]), max(h.shape[1] for h in inputs[:count])
            kept = to_come + (1 + TRANSIT) * sum(hidden.nbytes for hidden in inputs[:count])
            room = self._budget.room(rows * length, kept)
            if room != "none" or (count == 1 and self.make_room(rows * length, kept)):
                return room, count
            count //= 2
        return "none", 0
