"""Exactly-once delivery: the trunk's list of pending and answered steps, and the reasons to refuse a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedsplit.clock import Clock
from fedsplit.wire.packets import Packet, StepKey

T = TypeVar("T")


class RefusedStep(Exception):
    """The trunk must not serve a request. The subclass tells the reason, and the message names the step."""


class UnknownStep(RefusedStep):
    """The request is a gradient for a step that was never begun."""


class StaleStep(RefusedStep):
    """The request belongs to a step that the client has already finished or given up."""


class ExpiredStep(RefusedStep):
    """The request is a gradient for a step with an expired lease."""


class ForeignStep(RefusedStep):
    """The request is meant for a different run, or for an earlier incarnation of the trunk."""


class SpoiledStep(RefusedStep):
    """The request has tensors of the wrong shape, or values that lead to nothing finite."""


class UnboundedStep(SpoiledStep):
    """The request has, or leads to, values that are not finite or too large, as when training diverges."""


class SpoiledTogether(Exception):
    """Some requests of a batch must be refused. The rest of the batch can be served without the refused requests.

    Attributes:
        refused: Reasons by step.

    Example:
        >>> key = StepKey(round=1, client=0, step=0)
        >>> SpoiledTogether({key: StaleStep("too late")}).refused[key]
        StaleStep('too late')
    """

    def __init__(self, refused: Mapping[StepKey, RefusedStep]) -> None:
        """Takes the reasons by step."""
        super().__init__("; ".join(map(str, refused.values())))
        self.refused = refused


@dataclass
class _Client(Generic[T]):
    """State of a client's newest batch. Earlier batches leave no state.

    Attributes:
        place: Order of the batch among the client's batches.
        pending: Held objects and ends of leases by pending step.
        answers: Answers by answered step.
        expired: Steps with an expired lease.
        dropped: Answered steps without an answer, which was dropped to free memory.
        left: True after the end of the client's round.
    """

    place: tuple[int, int, int, int] = (-1, -1, -1, -1)  # before every batch
    pending: dict[StepKey, tuple[T, float]] = field(default_factory=dict)
    answers: dict[StepKey, Packet] = field(default_factory=dict)
    expired: set[StepKey] = field(default_factory=set)
    dropped: set[StepKey] = field(default_factory=set)
    left: bool = False


class Steps(Generic[T]):
    """State of every step: pending, answered, expired, or left behind.

    A client has one batch of a step at a time, of one or more micro-batches. The next batch of the client ends the
    batch before. A repeated request gets the same answer. The caller chooses an object to hold for each pending step.

    Attributes:
        run: Name of the run. Steps must carry the same name.
        incarnation: Identity of this start of the trunk. Packets must carry the same identity.

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
            incarnation: Identity of this start of the trunk.
            lease: Seconds for which a step may be pending after the last forward.
            clock: Clock for leases.
            clients: Number of clients in the run; None accepts any client.
            rounds: Number of rounds in the run; None accepts any round.
        """
        self.run = run
        self.incarnation = incarnation
        self._most_clients = clients
        self._most_rounds = rounds
        self._lease = lease
        self._clock = clock
        self._clients: defaultdict[int, _Client[T]] = defaultdict(_Client)

    def check(self, packet: Packet) -> None:
        """Checks that a packet is meant for this trunk.

        Raises:
            ForeignStep: The packet belongs to a different run or incarnation, or the run has no such client or round.
        """
        # An unlimited number would do harm: each client takes memory, and the round decides on ranks of adapters.
        if packet.key.run != self.run:
            raise ForeignStep(f"{packet.key} is of run {packet.key.run!r}, this trunk serves {self.run!r}")
        if packet.incarnation != self.incarnation:
            raise ForeignStep(f"{packet.key} is for another incarnation of the trunk: the trunk was started again")
        if self._most_clients is not None and packet.key.client >= self._most_clients:
            raise ForeignStep(f"{packet.key} is of a client that is none of the run's {self._most_clients}")
        if self._most_rounds is not None and packet.key.round > self._most_rounds:
            raise ForeignStep(f"{packet.key} is of a round that is none of the run's {self._most_rounds}")

    def moves_on(self, key: StepKey) -> None:
        """Drops the answers of a client's earlier steps if the client has come to a new step.

        A client repeats requests of the newest step only.
        """
        client = self._clients[key.client]
        if key.place > client.place:
            client.answers.clear()

    def drop_answers(self) -> int:
        """Drops the answers of clients without pending steps, and returns the number of dropped answers.

        A repeated request for a dropped answer is refused.
        """
        count = 0
        for client in self._clients.values():
            if not client.pending:
                count += len(client.answers)
                client.dropped.update(client.answers)
                client.answers.clear()
        return count

    def repeated(self, key: StepKey) -> T | None:
        """Returns the object held for a pending forward that is sent again, and renews the lease; otherwise None."""
        client = self._clients[key.client]
        if key not in client.pending:
            return None
        held, _ = client.pending[key]
        client.pending[key] = (held, self._clock() + self._lease)
        return held

    def begin(self, key: StepKey, held: T) -> None:
        """Makes a step pending, and ends the older steps of the client.

        Raises:
            StaleStep: The client has finished the step, has gone on to a later one, or has ended its round.
        """
        self.check_order(key)
        client = self._clients[key.client]
        if key.place > client.place:
            # A new record drops pending steps and answers of the last batch: the client has gone on without them.
            self._clients[key.client] = client = _Client(place=key.place)
        client.pending[key] = (held, self._clock() + self._lease)
        client.expired.discard(key)

    def check_order(self, key: StepKey) -> None:
        """Checks that a step may begin now.

        Raises:
            StaleStep: The step may not begin, for a reason that `begin` lists.
        """
        if self._is_past(key) or key in self._clients[key.client].answers:
            raise StaleStep(f"{key} lies behind what its client has done already")

    def _is_past(self, key: StepKey) -> bool:
        """Returns True if a client has finished or given up a step."""
        client = self._clients[key.client]
        has_left = client.left and key.place == client.place
        return key.place < client.place or has_left or key in client.dropped

    def held(self, key: StepKey) -> T:
        """Returns the object held for a pending step.

        Raises:
            UnknownStep, StaleStep, ExpiredStep: The step is not pending.
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
        """Returns True if a step waits for a gradient."""
        return key in self._clients[key.client].pending

    def answered(self, key: StepKey) -> Packet | None:
        """Returns the answer to a gradient that has come before; otherwise None."""
        return self._clients[key.client].answers.get(key)

    def answer(self, key: StepKey, packet: Packet) -> None:
        """Ends a pending step, and keeps the answer until the client goes on to the next step."""
        client = self._clients[key.client]
        del client.pending[key]
        client.answers[key] = packet

    def expire(self) -> int:
        """Drops steps with an expired lease, and returns the number of dropped steps."""
        now = self._clock()
        count = 0
        for client in self._clients.values():
            late = [key for key, (_, until) in client.pending.items() if until <= now]
            for key in late:
                del client.pending[key]
            client.expired.update(late)  # for the message to a client that comes after all
            count += len(late)
        return count

    def leave(self, client: int) -> int:
        """Drops all steps of a client that has left the round, or is dead. Returns the number of pending steps."""
        before = self._clients[client]
        self._clients[client] = _Client(place=before.place, left=True)  # the place tells late packets from new ones
        return len(before.pending)

    def pending(self) -> list[T]:
        """Returns the objects held for pending steps, oldest first for each client."""
        objects: list[T] = []
        for client in self._clients.values():
            objects += [held for held, _ in client.pending.values()]
        return objects

    def busy(self) -> set[int]:
        """Returns the clients with pending steps."""
        return {number for number, client in self._clients.items() if client.pending}

    def __len__(self) -> int:
        """Returns the number of pending steps."""
        return sum(len(client.pending) for client in self._clients.values())

    def next_expiry(self) -> float | None:
        """Returns the time of the next end of a lease; None without pending steps."""
        times: list[float] = []
        for client in self._clients.values():
            times += [until for _, until in client.pending.values()]
        return min(times, default=None)
