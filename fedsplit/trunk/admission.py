"""Admission control: accepts a step only if its activations and gradients will fit the memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fedsplit.clock import Clock
from fedsplit.trunk.memory import Budget, Room
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.registry import UnclippedGradient
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import Steps

TRANSIT = 3
"""Multiple of its own bytes that a packet takes while it arrives, in the buffers of the transport and as a tensor."""


class Admission:
    """Accepts steps under a memory budget, and reserves memory for what they will send.

    Where nothing else helps, it frees the graphs of pending batches, which are then computed again in the backward,
    and answers that are kept in case they are asked for again.
    """

    def __init__(
        self, budget: Budget, steps: Steps[PendingBatch | UnclippedGradient], lease: float, clock: Clock
    ) -> None:
        """Starts without reservations.

        Args:
            budget: Budget of resident memory.
            steps: The pending steps.
            lease: Seconds for which a reservation holds.
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
        """Reserves memory for a step whose hidden states have not been sent; returns False where there is too little.

        Args:
            key: The step.
            tokens: Tokens of the step, B * T.
            nbytes: Bytes of its hidden states.
        """
        if not self.make_room(tokens, self._bytes_to_come() + 2 * TRANSIT * nbytes):
            return False
        self._reserved[key] = TRANSIT * nbytes, self._clock() + self._lease
        return True

    def redeem(self, keys: Iterable[StepKey]) -> None:
        """Ends the reservations of steps whose hidden states have come."""
        for key in keys:
            self._reserved.pop(key, None)

    def leave(self, client: int) -> None:
        """Ends the reservations of a client that has ended its round, or is dead."""
        self._reserved = {key: reserved for key, reserved in self._reserved.items() if key.client != client}

    def expire(self) -> None:
        """Ends the reservations whose lease has run out."""
        now = self._clock()
        self._reserved = {key: reserved for key, reserved in self._reserved.items() if reserved[1] > now}

    def _bytes_to_come(self) -> int:
        """Returns the bytes that may come at any time: hidden states with a reservation, and pending gradients."""
        hidden = sum(size for size, _ in self._reserved.values())
        batches = {id(batch): batch for batch in self._batches()}.values()
        inputs = ((key, tensor) for batch in batches for key, tensor in batch.inputs.items())
        gradients = sum(tensor.nbytes for key, tensor in inputs if self._steps.is_pending(key))
        return 2 * hidden + TRANSIT * gradients

    def _batches(self) -> list[PendingBatch]:
        return [held for held in self._steps.pending() if isinstance(held, PendingBatch)]

    def make_room(self, tokens: int, kept: float, own: PendingBatch | None = None) -> bool:
        """Returns True if a step can be computed while some bytes are kept; frees the graphs of others where needed.

        Args:
            tokens: Tokens of the step, B * T.
            kept: Bytes that are kept; negative where as many are there already.
            own: Batch whose graph is not freed.
        """
        if self._budget.fits(tokens, kept):
            return True
        with_graph = [batch for batch in self._batches() if batch.output is not None and batch is not own]
        for batch in with_graph:
            batch.output = None
            self._budget.freed()
        if not with_graph and not len(self._steps) and not self._steps.drop_answers():
            return False
        self._budget.freed()
        return self._budget.fits(tokens, kept)

    def room(self, inputs: Sequence[Tensor]) -> tuple[Room, int]:
        """Returns how much of a batch may be kept, and how many of its steps fit.

        Args:
            inputs: Hidden states (B, T, D) of each step.
        """
        if self._budget.limit is None:
            return "graph", len(inputs)
        count = len(inputs)
        to_come = self._bytes_to_come()
        while count:
            chosen = inputs[:count]
            tokens = sum(hidden.shape[0] for hidden in chosen) * max(hidden.shape[1] for hidden in chosen)
            kept = to_come + (1 + TRANSIT) * sum(hidden.nbytes for hidden in chosen)
            room = self._budget.room(tokens, kept)
            if room != "none" or (count == 1 and self.make_room(tokens, kept)):
                return room, count
            count //= 2
        return "none", 0
