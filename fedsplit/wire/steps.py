"""Exactly-once delivery: the trunk's list of pending and answered steps, and its reasons to refuse one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedsplit.clock import Clock
from fedsplit.wire.packets import Packet, StepKey

T = TypeVar("T")


class RefusedStep(Exception):
    """The trunk must not serve a request; the subclass says why, the message names the step."""


class UnknownStep(RefusedStep):
    """The request is a gradient for a step that was never begun."""


class StaleStep(RefusedStep):
    """The request belongs to a step that its client has already finished or given up."""


class ExpiredStep(RefusedStep):
    """The request is a gradient for a step whose lease ran out."""


class ForeignStep(RefusedStep):
    """The request is meant for another run, or for another incarnation of the trunk."""


class SpoiledStep(RefusedStep):
    """The request has tensors of the wrong shape, or values that lead to nothing finite."""


class UnboundedStep(SpoiledStep):
    """The request has, or leads to, values that are not finite or too large, as when training diverges."""


class SpoiledTogether(Exception):
    """Some of several requests that are served as one must be refused; the others can be served without them.

    Attributes:
        refused: Reasons by step.
    """

    def __init__(self, refused: Mapping[StepKey, RefusedStep]) -> None:
        """Keeps the reasons."""
        super().__init__("; ".join(map(str, refused.values())))
        self.refused = refused


@dataclass
class _Client(Generic[T]):
    """State of a client: its newest step, and nothing of earlier ones."""

    place: tuple[int, int, int, int] = (-1, -1, -1, -1)
    pending: dict[StepKey, tuple[T, float]] = field(default_factory=dict)
    answers: dict[StepKey, Packet] = field(default_factory=dict)
    expired: set[StepKey] = field(default_factory=set)
    dropped: set[StepKey] = field(default_factory=set)
    left: bool = False


class Steps(Generic[T]):
    """State of every step: pending, answered, expired, or left behind.

    A client has one batch of a step at a time, of one or more micro-batches; its next batch ends it. A repeated
    request gets the same answer. The caller chooses an object to hold for each pending step.

    Attributes:
        run: Name of the run that steps must carry.
        incarnation: Id of the trunk's life that packets must carry.

    Example:
        >>> steps = Steps[str]("run", "first life", lease=60.0, clock=lambda: 0.0)
        >>> key = StepKey(round=1, client=0, step=0, run="run")
        >>> steps.begin(key, "its graph")
        >>> steps.held(key)
        'its graph'
        >>> steps.answer(key, Packet(key))
        >>> len(steps), steps.answered(key) == Packet(key)
        (0, True)
    """

    def __init__(
        self,
        run: str,
        incarnation: str,
        lease: float,
        clock: Clock,
        clients: int | None = None,
        rounds: int | None = None,
    ) -> None:
        """Starts without steps.

        Args:
            run: Name of the run.
            incarnation: Id of this life of the trunk.
            lease: Seconds for which a step may be pending since its last forward.
            clock: Clock for leases.
            clients: Number of clients in the run; None: any number may come.
            rounds: Number of rounds in the run; None: any number may come.
        """
        self.run = run
        self.incarnation = incarnation
        self._most_clients = clients
        self._most_rounds = rounds
        self._lease = lease
        self._clock = clock
        self._clients: defaultdict[int, _Client[T]] = defaultdict(_Client)

    def check(self, packet: Packet) -> None:
        """Makes sure that a packet is meant for this trunk.

        Raises:
            ForeignStep: It is of another run, for another incarnation, or of a client or round that the run does not
                have: every client's number takes memory, and the round decides about the ranks of an adapter.
        """
        if packet.key.run != self.run:
            raise ForeignStep(f"{packet.key} is of run {packet.key.run!r}, this trunk serves {self.run!r}")
        if packet.incarnation != self.incarnation:
            raise ForeignStep(f"{packet.key} is for another incarnation of the trunk: the trunk was started again")
        if self._most_clients is not None and packet.key.client >= self._most_clients:
            raise ForeignStep(f"{packet.key} is of a client that is none of the run's {self._most_clients}")
        if self._most_rounds is not None and packet.key.round > self._most_rounds:
            raise ForeignStep(f"{packet.key} is of a round that is none of the run's {self._most_rounds}")

    def moves_on(self, key: StepKey) -> None:
        """Drops the answers of a client's earlier steps if it has come to a new one: it asks for them no more."""
        client = self._clients[key.client]
        if key.place > client.place:
            client.answers.clear()

    def drop_answers(self) -> int:
        """Drops the answers of clients without pending steps, and returns how many; requests for them are refused."""
        count = 0
        for client in self._clients.values():
            if not client.pending:
                count += len(client.answers)
                client.dropped.update(client.answers)
                client.answers.clear()
        return count

    def repeated(self, key: StepKey) -> T | None:
        """Returns the object held for a repeated forward that is still pending, and renews its lease; else None."""
        held = self._clients[key.client].pending.get(key)
        if held is None:
            return None
        self._clients[key.client].pending[key] = (held[0], self._clock() + self._lease)
        return held[0]

    def begin(self, key: StepKey, held: T) -> None:
        """Makes a step pending, and ends its client's older ones.

        Raises:
            StaleStep: The client has finished the step, has gone on to a later one, or has ended its round.
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
            StaleStep: It may not, for one of the reasons of `begin`.
        """
        if self._is_past(key) or key in self._clients[key.client].answers:
            raise StaleStep(f"{key} lies behind what its client has done already")

    def _is_past(self, key: StepKey) -> bool:
        client = self._clients[key.client]
        return key.place < client.place or (client.left and key.place == client.place) or key in client.dropped

    def held(self, key: StepKey) -> T:
        """Returns the object held for a pending step.

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
        """Returns True if a step waits for its gradient."""
        return key in self._clients[key.client].pending

    def answered(self, key: StepKey) -> Packet | None:
        """Returns the answer to a gradient that has come before; else None."""
        return self._clients[key.client].answers.get(key)

    def answer(self, key: StepKey, packet: Packet) -> None:
        """Ends a pending step, and keeps its answer until the client goes on to the next."""
        client = self._clients[key.client]
        del client.pending[key]
        client.answers[key] = packet

    def expire(self) -> int:
        """Drops the steps whose lease has run out, and returns how many."""
        now = self._clock()
        count = 0
        for client in self._clients.values():
            late = [key for key, (_, until) in client.pending.items() if until <= now]
            for key in late:
                del client.pending[key]
            client.expired.update(late)
            count += len(late)
        return count

    def leave(self, client: int) -> int:
        """Drops all steps of a client that has ended its round, or is dead; returns how many were pending."""
        kept = self._clients[client]
        count = len(kept.pending)
        self._clients[client] = _Client(place=kept.place, left=True)
        return count

    def pending(self) -> list[T]:
        """Returns the objects held for pending steps, oldest first for each client."""
        return [held for client in self._clients.values() for held, _ in client.pending.values()]

    def busy(self) -> set[int]:
        """Returns the clients with pending steps."""
        return {number for number, client in self._clients.items() if client.pending}

    def __len__(self) -> int:
        """Returns the number of pending steps."""
        return sum(len(client.pending) for client in self._clients.values())

    def next_expiry(self) -> float | None:
        """Returns the time at which the next lease runs out; None without pending steps."""
        return min((until for c in self._clients.values() for _, until in c.pending.values()), default=None)
