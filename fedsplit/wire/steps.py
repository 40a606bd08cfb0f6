"""Exactly once: which steps are pending at the trunk, which are answered, and which must be refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedsplit.wire.packets import Packet, StepKey

T = TypeVar("T")


class RefusedStep(Exception):
    """A request that the trunk must not serve; the subclass says why, the message names the step."""


class UnknownStep(RefusedStep):
    """A gradient for a step that was never begun."""


class StaleStep(RefusedStep):
    """A request for a step that its client has left behind."""


class ExpiredStep(RefusedStep):
    """A gradient for a step whose lease ran out."""


class ForeignStep(RefusedStep):
    """A request for another run, or for another incarnation of the trunk."""


class SpoiledStep(RefusedStep):
    """A request whose tensors have the wrong shape, or values that nothing finite can be computed from."""


class UnboundedStep(SpoiledStep):
    """A request with values that are not finite or too large, or that lead to such, as when training diverges."""


class SpoiledTogether(Exception):
    """Some of several requests that are served as one must be refused; the others can be served without them.

    Attributes:
        refused: By step, why it is refused.
    """

    def __init__(self, refused: Mapping[StepKey, RefusedStep]) -> None:
        """Keeps the refusals."""
        super().__init__("; ".join(map(str, refused.values())))
        self.refused = refused


@dataclass
class _Client(Generic[T]):
    """What is kept of a client: its newest step, and nothing of those before."""

    place: tuple[int, int, int, int] = (-1, -1, -1, -1)
    pending: dict[StepKey, tuple[T, float]] = field(default_factory=dict)
    answers: dict[StepKey, Packet] = field(default_factory=dict)
    expired: set[StepKey] = field(default_factory=set)
    dropped: set[StepKey] = field(default_factory=set)
    left: bool = False


class Steps(Generic[T]):
    """The life of every step: begun, pending, answered; or expired, or left behind.

    A client has one batch of a step at a time, of one or more micro-batches; beginning the next one ends it. What is
    repeated gets the answer it got before. What is held for a pending step is the caller's.

    Attributes:
        run: The run whose steps these are; empty where any is taken.
        incarnation: This life of the trunk; empty where requests need not name it.
    """

    def __init__(self, run: str, incarnation: str, lease: float, clock: Callable[[], float]) -> None:
        """Starts with no step.

        Args:
            run: The run's name.
            incarnation: This life of the trunk.
            lease: Seconds that a step may be pending since its last forward.
            clock: Seconds, always growing.
        """
        self.run, self.incarnation = run, incarnation
        self._lease, self._clock = lease, clock
        self._clients: defaultdict[int, _Client[T]] = defaultdict(_Client)

    def check(self, packet: Packet) -> None:
        """Makes sure that a packet is meant for this trunk.

        Raises:
            ForeignStep: It is of another run or for another incarnation.
        """
        if packet.key.run != self.run:
            raise ForeignStep(f"{packet.key} is of run {packet.key.run!r}, this trunk serves {self.run!r}")
        if packet.incarnation != self.incarnation:
            raise ForeignStep(f"{packet.key} is for another incarnation of the trunk: the trunk was started again")

    def moves_on(self, key: StepKey) -> None:
        """A client has come to a new step: what it was answered before is not asked for again."""
        client = self._clients[key.client]
        if key.place > client.place:
            client.answers.clear()

    def drop_answers(self) -> int:
        """Forgets answers of clients that have nothing pending; whoever asks for one again is refused."""
        count = 0
        for client in self._clients.values():
            if not client.pending:
                count += len(client.answers)
                client.dropped.update(client.answers)
                client.answers.clear()
        return count

    def repeated(self, key: StepKey) -> T | None:
        """What is held for a forward that came before and is still pending; its lease begins anew."""
        held = self._clients[key.client].pending.get(key)
        if held is None:
            return None
        self._clients[key.client].pending[key] = (held[0], self._clock() + self._lease)
        return held[0]

    def begin(self, key: StepKey, held: T) -> None:
        """Makes a step pending, and its client's older ones things of the past.

        Raises:
            StaleStep: The client has answered it already, or gone on to a later one, or ended its round.
        """
        self.check_order(key)
        client = self._clients[key.client]
        if key.place > client.place:
            self._clients[key.client] = client = _Client(place=key.place)
        client.pending[key] = (held, self._clock() + self._lease)
        client.expired.discard(key)

    def check_order(self, key: StepKey) -> None:
        """Makes sure that a step may begin now.

        Raises:
            StaleStep: As in `begin`.
        """
        if self._is_past(key) or key in self._clients[key.client].answers:
            raise StaleStep(f"{key} lies behind what its client has done already")

    def _is_past(self, key: StepKey) -> bool:
        client = self._clients[key.client]
        return key.place < client.place or (client.left and key.place == client.place) or key in client.dropped

    def held(self, key: StepKey) -> T:
        """What is held for a pending step.

        Raises:
            UnknownStep, StaleStep, ExpiredStep: It is not pending.
        """
        client = self._clients[key.client]
        if key in client.pending:
            return client.pending[key][0]
        if key in client.expired:
            raise ExpiredStep(f"the lease of {key} ran out before its gradient came")
        if self._is_past(key):
            raise StaleStep(f"{key} lies behind what its client has done already")
        raise UnknownStep(f"no forward is pending for {key}")

    def is_pending(self, key: StepKey) -> bool:
        """Whether a step waits for its gradient."""
        return key in self._clients[key.client].pending

    def answered(self, key: StepKey) -> Packet | None:
        """The answer that a gradient got when it came first."""
        return self._clients[key.client].answers.get(key)

    def answer(self, key: StepKey, packet: Packet) -> None:
        """Ends a pending step, and keeps its answer until its client goes on."""
        client = self._clients[key.client]
        del client.pending[key]
        client.answers[key] = packet

    def expire(self) -> int:
        """Frees what is held for steps whose lease has run out; returns how many."""
        now, count = self._clock(), 0
        for client in self._clients.values():
            late = [key for key, (_, until) in client.pending.items() if until <= now]
            for key in late:
                del client.pending[key]
            client.expired.update(late)
            count += len(late)
        return count

    def leave(self, client: int) -> int:
        """Frees all of a client that is done or dead; returns how many of its steps were pending."""
        kept = self._clients[client]
        count = len(kept.pending)
        self._clients[client] = _Client(place=kept.place, left=True)
        return count

    def pending(self) -> list[T]:
        """What is held, oldest first for each client."""
        return [held for client in self._clients.values() for held, _ in client.pending.values()]

    def busy(self) -> set[int]:
        """The clients of which something is pending."""
        return {number for number, client in self._clients.items() if client.pending}

    def __len__(self) -> int:
        """How many steps are pending."""
        return sum(len(client.pending) for client in self._clients.values())

    def next_expiry(self) -> float | None:
        """When the next lease runs out, by the clock."""
        return min((until for c in self._clients.values() for _, until in c.pending.values()), default=None)
