"""Admission control: accepts a step only if its activations and gradients will fit the memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fedsplit.clock import Clock
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.memory import Budget, Room
from fedsplit.trunk.pending import PendingBatch
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import Steps

TRANSIT = 3
"""Memory of an arriving packet, as a multiple of the packet's bytes: buffers of the transport, and the tensor."""


class Admission:
    """Accepts steps under a memory budget, and reserves memory for the tensors to come.

    If nothing else helps, graphs of pending batches and kept answers are freed. A batch without a graph is computed
    again in the backward. A freed answer can no longer be repeated, so a repeated request is then refused.
    """

    def __init__(
        self, budget: Budget, steps: Steps[PendingBatch | UnclippedGradient], lease: float, clock: Clock
    ) -> None:
        """Starts without reservations.

        Args:
            budget: Budget of resident memory.
            steps: The pending steps.
            lease: Seconds until an unused reservation ends.
            clock: Clock for leases.
        """
        self._budget = budget
        self._steps = steps
        self._lease = lease
        self._clock = clock
        self._reserved: dict[StepKey, tuple[int, float]] = {}

    def has_reserved(self, key: StepKey) -> bool:
        """Returns True if memory is reserved for a step."""
        return key in self._reserved

    def reserve(self, key: StepKey, tokens: int, nbytes: int) -> bool:
        """Reserves memory for a step before the client sends hidden states. Returns False if memory is too short.

        Args:
            key: The step.
            tokens: Tokens of the step, B * T.
            nbytes: Bytes of the step's hidden states.
        """
        # Twice: a gradient of the same size follows the hidden states.
        if not self.make_room(tokens, self._bytes_to_come() + 2 * TRANSIT * nbytes):
            return False
        until = self._clock() + self._lease
        self._reserved[key] = TRANSIT * nbytes, until
        return True

    def redeem(self, keys: Iterable[StepKey]) -> None:
        """Ends the reservations of steps at the arrival of the hidden states."""
        for key in keys:
            self._reserved.pop(key, None)

    def leave(self, client: int) -> None:
        """Ends the reservations of a client that has left the round, or is dead."""
        # A list, since the loop deletes entries.
        for key in [key for key in self._reserved if key.client == client]:
            del self._reserved[key]

    def expire(self) -> None:
        """Ends the reservations after the end of the lease."""
        now = self._clock()
        expired = [key for key, (_, until) in self._reserved.items() if until <= now]
        for key in expired:
            del self._reserved[key]

    def _bytes_to_come(self) -> int:
        """Returns the bytes that may come at any time: hidden states with a reservation, and pending gradients."""
        hidden = sum(size for size, _ in self._reserved.values())
        gradients = 0
        # A batch of several steps is held once for each step, and must be counted once.
        batches = {id(batch): batch for batch in self._batches()}
        for batch in batches.values():
            for key, tensor in batch.inputs.items():
                if self._steps.is_pending(key):
                    gradients += tensor.nbytes  # a gradient has the size of its hidden states
        # Reserved bytes are those of the hidden states on their way. Twice, since their gradients follow.
        return 2 * hidden + TRANSIT * gradients

    def _batches(self) -> list[PendingBatch]:
        return [held for held in self._steps.pending() if isinstance(held, PendingBatch)]

    def make_room(self, tokens: int, kept: float, own: PendingBatch | None = None) -> bool:
        """Returns True if a step can be computed while some bytes are kept. Frees graphs of pending batches if needed.

        Args:
            tokens: Tokens of the step, B * T.
            kept: Bytes to keep; negative if resident memory already includes as many.
            own: Batch with a graph to keep.
        """
        if self._budget.fits(tokens, kept):
            return True
        others = [batch for batch in self._batches() if batch is not own]
        with_graph = [batch for batch in others if batch.output is not None]
        for batch in with_graph:
            batch.output = None
            self._budget.freed()
        # Answers are dropped last, and only without pending steps: a dropped answer makes a lost packet fatal.
        if not with_graph and not len(self._steps) and not self._steps.drop_answers():
            return False
        self._budget.freed()
        return self._budget.fits(tokens, kept)

    def room(self, inputs: Sequence[Tensor]) -> tuple[Room, int]:
        """Returns how much of a batch may be kept, and how many steps of the batch fit.

        Args:
            inputs: Hidden states (B, T, D) of each step.
        """
        if self._budget.limit is None:
            return "graph", len(inputs)
        count = len(inputs)
        to_come = self._bytes_to_come()
        while count:
            chosen = inputs[:count]
            rows = sum(hidden.shape[0] for hidden in chosen)
            longest = max(hidden.shape[1] for hidden in chosen)
            tokens = rows * longest  # shorter sequences are padded to the longest
            # The inputs stay until the backward, and gradients of the same size will pass through the transport.
            kept = to_come + (1 + TRANSIT) * sum(hidden.nbytes for hidden in chosen)
            room = self._budget.room(tokens, kept)
            if room != "none":
                return room, count
            # Graphs are freed for a single step only: for several, a smaller batch is the cheaper way.
            if count == 1 and self.make_room(tokens, kept):
                return room, count
            count //= 2
        return "none", 0
