"""Order of the trunk's work: turns, gathering, barriers, and how long the others wait for a client that is late."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fedsplit.clock import Clock
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.workers import BACKWARD, FORWARD, Work, Workers, outcome
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep, SpoiledStep, SpoiledTogether, StaleStep

Answer = Packet | Exception
"""Result of a request: a packet, or the reason why there is none."""

Done = Callable[[Answer], None]
"""Takes the result of a request."""


@dataclass(eq=False)
class _Request:
    """A packet that waits to be served.

    Attributes:
        packet: The packet.
        arrived: Time of its arrival.
        done: Takes the answer.
        repeats: True if it was served before, and gets the same answer.
    """

    packet: Packet
    arrived: float
    done: Done
    repeats: bool = False

    @property
    def client(self) -> int:
        """Number of the client."""
        return self.packet.key.client

    @property
    def is_backward(self) -> bool:
        """True for a gradient and for a clipping coefficient."""
        return "gradient" in self.packet.tensors or self.packet.clips

    @property
    def is_admission(self) -> bool:
        """True for an admission request."""
        return not self.packet.tensors

    @property
    def worker(self) -> str:
        """Name of the worker that computes it."""
        return BACKWARD if self.is_backward else FORWARD

    @property
    def is_step(self) -> bool:
        """True for a part of a training step."""
        return (self.is_backward or self.packet.training) and not self.is_admission

    @property
    def teaches(self) -> bool:
        """True for a part of a step that the trunk learns from, whose order matters."""
        return self.is_step and self.packet.learns


class Dispatcher:
    """Decides in which order the trunk serves the requests of its clients.

    Repeats, evaluations, admission requests and steps from which the trunk does not learn are served as they come,
    and gradients before new forwards, since a gradient frees memory. Beyond that the schedule decides:

    - `batched`: a forward waits until every active client has one, a gradient until all of its batch have come;
    - `accumulate`: a client that has done `every` steps since the last barrier waits there for the other active ones;
    - `--deterministic`: clients train in groups. Under `shared` the members of a group take turns, request by
      request, in a fixed order; under `batched` and `accumulate` all members are waited for, however late.

    A client is active from its first forward of a round (or, in a group, from the start of the round) until it leaves.
    A client that keeps the others waiting beyond the deadline is left behind: the others no longer wait for it, until
    it comes back.

    With workers, one forward and one backward are computed at the same time, and `advance` returns before they are
    done. A forward sees the newest snapshot of the adapter at its beginning. Every other call of dispatcher and trunk
    must wait until nothing is under way; only `leave` may be called as soon as nothing of its client is.

    Used by one thread, which also calls `done`.
    """

    def __init__(
        self,
        server: TrunkServer,
        settings: TrunkSettings,
        clock: Clock = time.monotonic,
        workers: Workers | None = None,
    ) -> None:
        """Starts without requests.

        Args:
            server: Trunk that computes.
            settings: Schedule, deadline in seconds, and steps between barriers.
            clock: Clock for deadlines.
            workers: Workers for forwards and backwards. Where not given, both are computed in `advance`, one after
                the other.
        """
        self.server = server
        self._clock = clock
        self._workers = workers
        self._schedule = SCHEDULES[settings.schedule]
        self._patience = settings.deadline
        self._every = settings.every
        self._under_way: list[Sequence[_Request]] = []
        self._waiting: list[_Request] = []
        self._active: set[int] = set()
        self._contributed: Counter[int] = Counter()
        self._sent_away: Counter[int] = Counter()
        self._turns: list[int] = []
        self._grouped = False
        self._group: set[int] = set()

    @property
    def is_computing(self) -> bool:
        """True while a worker computes."""
        return bool(self._under_way)

    def computes_for(self, client: int) -> bool:
        """Returns True while a worker computes for a client, so that the client cannot leave yet."""
        return any(request.client == client for requests in self._under_way for request in requests)

    def _is_busy(self, worker: str) -> bool:
        return any(requests[0].worker == worker for requests in self._under_way)

    def begin(self, group: Sequence[int]) -> None:
        """Makes clients a group that trains together; until `end_round`, the training of others is refused.

        Args:
            group: The clients, in the order of their turns.
        """
        takes_turns = not (self._schedule.gathers or self._schedule.sums)
        self._grouped = True
        self._group = set(group)
        self._active = set(group)
        self._turns = list(group) if takes_turns else []

    def submit(self, packet: Packet, done: Done) -> None:
        """Takes a request. What cannot be served at all is refused at once.

        Args:
            packet: The request.
            done: Called with the answer, or with the reason why there is none, from `advance`.
        """
        try:
            check_form(packet)
            self._check_group(packet)
        except (MalformedPacket, RefusedStep) as error:
            done(error if isinstance(error, RefusedStep) else SpoiledStep(str(error)))
            return
        request = _Request(packet, self._clock(), done)
        self._waiting.append(request)
        if packet.training and not request.is_backward and not self._grouped:
            self._active.add(request.client)

    def _check_group(self, packet: Packet) -> None:
        """Makes sure that only clients of the group train. The turn of a further client would never come.

        Raises:
            StaleStep: The packet trains for a client that is not in the group, or has left it.
        """
        request = _Request(packet, 0.0, lambda answer: None)
        if self._grouped and request.is_step and request.client not in self._group:
            raise StaleStep(f"{packet.key}: its client does not train now")

    def leave(self, client: int) -> None:
        """Ends the round of a client that has finished or is dead. No request waits for the client any more."""
        self._active.discard(client)
        self._group.discard(client)
        self._contributed.pop(client, None)
        if client in self._turns:
            self._turns.remove(client)
        gone = [request for request in self._waiting if request.client == client]
        self._waiting = [request for request in self._waiting if request.client != client]
        for request in gone:
            request.done(StaleStep(f"{request.packet.key}: the client has left"))
        self.server.leave(client)

    def end_round(self, finished: Sequence[int]) -> RoundCounts:
        """Ends the round for all clients.

        Args:
            finished: Clients whose round counts.

        Returns:
            Counts of the round.
        """
        for client in {request.client for request in self._waiting} | self._active:
            self.leave(client)
        self._grouped = False
        self._group = set()
        self._turns = []
        return self.server.end_round(finished)

    def advance(self) -> bool:
        """Serves the next request, or batch of requests; returns False if there was none that could be served."""
        if not self._is_busy(BACKWARD):  # a batch that is being differentiated is still pending
            self.server.expire()
        chosen = self._choose()
        if not chosen:
            return False
        self._waiting = [request for request in self._waiting if request not in chosen]
        self._serve(chosen)
        return True

    def wakes_at(self) -> float | None:
        """Returns the time of the next deadline or expiry, at which `advance` may find something without a request."""
        times = [self._deadline(group) for group in self._held_up() if group]
        expiry = None if self._is_busy(BACKWARD) else self.server.steps.next_expiry()
        if expiry is not None:
            times.append(expiry)
        return min((time for time in times if time < math.inf), default=None)

    def _deadline(self, group: Iterable[_Request]) -> float:
        return math.inf if self._grouped else min(request.arrived for request in group) + self._patience

    @property
    def _ready(self) -> list[_Request]:
        """Requests whose worker is free."""
        return [request for request in self._waiting if not self._is_busy(request.worker)]

    def _choose(self) -> list[_Request]:
        """Returns the requests to serve next, as one batch; none where all have to wait."""
        for request in self._ready:
            request.repeats = self.server.is_repeat(request.packet)
            waits_for_nobody = request.is_admission or not (request.teaches or request.client in self._turns)
            if waits_for_nobody or request.repeats:
                return [request]
        if self._turns:
            return self._turn()
        if self._schedule.gathers:
            return self._gather()
        return self._first_step()

    def _first_step(self) -> list[_Request]:
        """Returns the first part of a step that need not wait at the barrier, gradients first."""
        steps = [request for request in self._ready if request.teaches]
        steps.sort(key=lambda request: not request.is_backward)
        for request in steps:
            if request.is_backward or not self._at_barrier(request):
                return [request]
        if self.is_computing:  # the result may count before the barrier
            return []
        if steps and (self._everybody_contributed(steps) or self._deadline(steps) <= self._clock()):
            self._pass_barrier()
            return [steps[0]]
        return []

    def _turn(self) -> list[_Request]:
        """Returns the next request of the client whose turn it is."""
        candidates = [request for request in self._ready if request.client == self._turns[0]]
        if not candidates:
            return []
        self._turns.append(self._turns.pop(0))
        return [min(candidates, key=lambda r: (r.packet.key.place, r.is_backward, r.packet.key.micro))]

    def _held_up(self) -> list[list[_Request]]:
        """Returns the groups of requests that wait for those of other clients; a group is served at once.

        Of gathered requests, a group has each step once, and one forward of a client. A request that comes again
        waits, and is a repeat as soon as the first one is answered.
        """
        steps = [request for request in self._ready if request.teaches]
        if self._schedule.gathers:
            return [*self._gradients_by_batch(steps), self._first_forwards(steps)]
        return [steps] if self._schedule.sums else []

    def _gradients_by_batch(self, steps: Sequence[_Request]) -> list[list[_Request]]:
        """Groups gradients by the batch that their forwards were computed in."""
        groups: dict[object, dict[StepKey, _Request]] = {}
        for request in steps:
            if request.is_backward and not request.packet.clips:
                groups.setdefault(self._batch_of(request), {}).setdefault(request.packet.key, request)
        return [list(group.values()) for group in groups.values()]

    @staticmethod
    def _first_forwards(steps: Sequence[_Request]) -> list[_Request]:
        """Returns the earliest forward of each client."""
        forwards = [request for request in steps if not request.is_backward]
        forwards.sort(key=lambda request: request.packet.key.place)
        by_client: dict[int, _Request] = {}
        for request in forwards:
            by_client.setdefault(request.client, request)
        return list(by_client.values())

    def _batch_of(self, request: _Request) -> object:
        """Returns an id of the batch that a gradient belongs to; a request that will be refused stands alone."""
        try:
            return id(self.server.steps.held(request.packet.key))
        except RefusedStep:
            return request

    def _gather(self) -> list[_Request]:
        """Returns all requests of a batch, once all clients have sent theirs or the deadline has passed.

        A clipping coefficient belongs to no batch, and waits for nobody.
        """
        if coefficients := [request for request in self._ready if request.packet.clips]:
            return coefficients[:1]
        *batches, forwards = self._held_up()
        for group in batches:
            members = self.server.companions(group[0].packet.key)
            there = {request.client for request in group}
            if there >= members & self._active or self._late(group, members):
                return group
        there = {request.client for request in forwards}
        if forwards and (there >= self._active or self._late(forwards, self._active)):
            # A client that was sent away for want of memory comes first, or it might be sent away for ever.
            forwards.sort(key=lambda request: (-self._sent_away[request.client], request.client))
            return [request for request in forwards if _like(request.packet) == _like(forwards[0].packet)]
        return []

    def _late(self, group: Sequence[_Request], members: set[int]) -> bool:
        """Returns True if a group has waited long enough; the members that are missing are then left behind."""
        if self._deadline(group) > self._clock():
            return False
        self._active -= members - {request.client for request in group}
        return True

    def _at_barrier(self, request: _Request) -> bool:
        return self._schedule.sums and self._every > 0 and self._contributed[request.client] >= self._every

    def _everybody_contributed(self, waiting: Sequence[_Request]) -> bool:
        """Returns True if each active client has contributed to the barrier.

        In a group each must also have come to the barrier. Requests that wait for nobody then see the snapshot before
        it, whatever their time.
        """
        if self._grouped and self._active - {request.client for request in waiting}:
            return False
        return all(self._contributed[client] >= self._every for client in self._active)

    def _pass_barrier(self) -> None:
        self._active &= {client for client, count in self._contributed.items() if count >= self._every}
        self._contributed.clear()
        self.server.adapters.close_window()

    def _serve(self, chosen: Sequence[_Request]) -> None:
        """Begins to serve requests; without workers, serves them to the end."""
        packets = [request.packet for request in chosen]
        if chosen[0].is_admission:
            self._settle(chosen, outcome(lambda: [self.server.ask(packets[0])]))
            return
        begin = self.server.begin_backward if chosen[0].is_backward else self.server.begin_forward
        work = outcome(lambda: begin(packets))
        if isinstance(work, Exception):
            self._settle(chosen, work)
        elif self._workers is None:
            self._settle(chosen, outcome(work.done))
        else:
            self._under_way.append(chosen)
            self._workers.start(chosen[0].worker, work.compute, lambda result: self._finish(chosen, work, result))

    def _finish(self, chosen: Sequence[_Request], work: Work, result: object) -> None:
        """Finishes work that a worker has computed."""
        self._under_way.remove(chosen)
        answers = result if isinstance(result, Exception) else outcome(lambda: work.finish(result))
        self._settle(chosen, answers)

    def _settle(self, chosen: Sequence[_Request], answers: Sequence[Answer] | Exception) -> None:
        """Gives each request its answer, or the reason why there is none."""
        if isinstance(answers, SpoiledTogether):
            self._serve_without(chosen, answers)
            return
        if isinstance(answers, RefusedStep) and len(chosen) > 1:
            for request in chosen:  # one spoils it for all: each alone, so that only that one is refused
                self._serve([request])
            return
        if isinstance(answers, Exception):  # the requests' to know: it must not end the thread that serves everybody
            answers = [answers] * len(chosen)
        for request, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Packet):
                self._remember(request, answer)
            request.done(answer)

    def _serve_without(self, chosen: Sequence[_Request], spoiled: SpoiledTogether) -> None:
        """Refuses some requests of a batch, and serves the others."""
        rest = []
        for request in chosen:
            refusal = spoiled.refused.get(request.packet.key)
            if refusal is None:
                rest.append(request)
            else:
                request.done(refusal)
        if rest:
            self._serve(rest)

    def _remember(self, request: _Request, answer: Packet) -> None:
        """Records an answer for the groups: clients that were refused, and clients that contributed to the barrier."""
        if answer.wait:
            self._sent_away[request.client] += 1
            self._active.discard(request.client)  # the clients that wait for it may hold the memory that it waits for
        elif self._sent_away.pop(request.client, None) and request.packet.training:
            self._active.add(request.client)
        if request.repeats:
            return
        packet = request.packet
        ends_step = packet.clips if self.server.adapters.clips else request.is_backward and packet.ends
        if ends_step and packet.learns:
            self._contributed[request.client] += 1


def _like(packet: Packet) -> tuple[bool, str]:
    """Returns what forwards of one batch must have in common: whether gradients go back, and the type of hidden states.

    Joined with wider ones of another client, hidden states would be computed with in another type.
    """
    hidden = packet.tensors.get("hidden")
    return packet.wants_gradient, hidden.dtype if hidden else ""
