"""What the trunk computes next: turns, gathering, barriers, and for how long the others wait for one who is late."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.config import TrunkSettings
from fedsplit.trunk.lanes import BACKWARD, FORWARD, LanesLike, outcome
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer, Work
from fedsplit.wire.packets import MalformedPacket, Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep, SpoiledStep, SpoiledTogether, StaleStep

Answer = Packet | Exception
"""What a request comes to: an answer, or why there is none."""


@dataclass(eq=False)
class _Request:
    """A packet that waits to be served.

    Attributes:
        packet: The packet.
        arrived: When it came, by the clock.
        done: Takes the answer.
        repeats: It was served before, and gets the same answer.
    """

    packet: Packet
    arrived: float
    done: Callable[[Answer], None]
    repeats: bool = False

    @property
    def client(self) -> int:
        return self.packet.key.client

    @property
    def is_backward(self) -> bool:
        """A gradient, or what it is to be scaled by."""
        return "gradient" in self.packet.tensors or self.packet.clips

    @property
    def is_question(self) -> bool:
        """Whether there is room for a step that is to come."""
        return not self.packet.tensors

    @property
    def lane(self) -> str:
        """Where it is computed."""
        return BACKWARD if self.is_backward else FORWARD

    @property
    def is_step(self) -> bool:
        """Part of a training step, whose order matters."""
        return (self.is_backward or self.packet.training) and not self.is_question


class Dispatcher:
    """Puts what clients ask for into the order in which the trunk computes it.

    Repeats, evaluations and questions for room are served as they come, and gradients before new forwards,
    since a gradient frees memory. Beyond that the schedule decides:

    - `batched`: a forward waits until every active client has one, a gradient until all of its flight have come;
    - `accumulate`: who has done `every` steps since the last barrier waits at it for the other active ones;
    - `--deterministic`: clients train in groups. Under `shared` the members of a group take turns, request by
      request, in a fixed order; under `batched` and `accumulate` all members are waited for, however late.

    A client is active from its first forward of a round (of a group: from the round's start) until it leaves.
    Who keeps the others waiting past the deadline is left behind: it is not waited for until it comes back.
    Used by one thread; `done` is called in it.

    With lanes, one forward and one backward are computed at the same time, each in its lane, and `advance` returns
    before they are through. A forward then sees the newest version of the adapter there was as it began. Whatever else
    is asked of dispatcher and trunk must wait until nothing is under way; a client may leave as soon as nothing of its
    own is.
    """

    def __init__(
        self,
        server: TrunkServer,
        settings: TrunkSettings,
        clock: Callable[[], float] = time.monotonic,
        lanes: LanesLike | None = None,
    ) -> None:
        """Puts itself in front of a trunk.

        Args:
            server: Who computes.
            settings: Schedule, deadline in seconds, and steps between barriers.
            clock: Seconds, always growing.
            lanes: Where forwards and backwards are computed; here, one after the other, where not given.
        """
        self.server, self._lanes = server, lanes
        self._under_way: list[Sequence[_Request]] = []
        self._schedule = SCHEDULES[settings.schedule]
        self._patience, self._every, self._clock = settings.deadline, settings.every, clock
        self._waiting: list[_Request] = []
        self._active: set[int] = set()
        self._contributed: Counter[int] = Counter()
        self._sent_away: Counter[int] = Counter()
        self._turns: list[int] = []
        self._grouped = False
        self._group: set[int] = set()

    @property
    def is_computing(self) -> bool:
        """Whether anything is under way in a lane."""
        return bool(self._under_way)

    def computes_for(self, client: int) -> bool:
        """Whether anything of a client is under way in a lane, so that it cannot leave yet."""
        return any(request.client == client for requests in self._under_way for request in requests)

    def _is_busy(self, lane: str) -> bool:
        return any(requests[0].lane == lane for requests in self._under_way)

    def begin(self, group: Sequence[int]) -> None:
        """Makes clients a group that trains together, in this order; until `end_round`, others are refused.

        Args:
            group: The clients, in the order of their turns.
        """
        self._grouped = True
        self._group = set(group)
        self._active = set(group)
        self._turns = list(group) if not (self._schedule.gathers or self._schedule.sums) else []

    def submit(self, packet: Packet, done: Callable[[Answer], None]) -> None:
        """Takes a request; `done` is called with the answer, or with why there is none, from `advance`.

        What cannot be served at all, now or later, is refused at once.
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
        """Makes sure that while a group trains nobody else does: its turn would never come.

        Raises:
            StaleStep: The packet is of the training of a client that is not in the group, or has left it.
        """
        request = _Request(packet, 0.0, lambda answer: None)
        if self._grouped and request.is_step and request.client not in self._group:
            raise StaleStep(f"{packet.key}: its client does not train now")

    def leave(self, client: int) -> None:
        """A client has ended its round, or is dead; nobody waits for it any more."""
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

    def end_round(self, finished: Sequence[int]) -> dict[str, int]:
        """Ends the round of all clients; as `TrunkServer.end_round`."""
        for client in {request.client for request in self._waiting} | self._active:
            self.leave(client)
        self._grouped, self._group, self._turns = False, set(), []
        return self.server.end_round(finished)

    def advance(self) -> bool:
        """Serves what is to be served next; returns whether there was anything."""
        if not self._is_busy(BACKWARD):  # what is being differentiated is still pending
            self.server.expire()
        chosen = self._choose()
        if not chosen:
            return False
        self._waiting = [request for request in self._waiting if request not in chosen]
        self._serve(chosen)
        return True

    def wakes_at(self) -> float | None:
        """When, by the clock, something may change without a new request: a deadline or a lease."""
        times = [self._deadline(group) for group in self._held_up() if group]
        expiry = None if self._is_busy(BACKWARD) else self.server.steps.next_expiry()
        return min([t for t in (*times, expiry) if t is not None and t < math.inf], default=None)

    def _deadline(self, group: Iterable[_Request]) -> float:
        return math.inf if self._grouped else min(request.arrived for request in group) + self._patience

    @property
    def _ready(self) -> list[_Request]:
        """Requests whose lane is free."""
        return [request for request in self._waiting if not self._is_busy(request.lane)]

    def _choose(self) -> list[_Request]:
        for request in self._ready:
            request.repeats = self.server.is_repeat(request.packet)
            free = request.is_question or not (request.is_step or request.client in self._turns)
            if free or request.repeats:
                return [request]
        if self._turns:
            return self._turn()
        if self._schedule.gathers:
            return self._gather()
        steps = sorted((r for r in self._ready if r.is_step), key=lambda r: not r.is_backward)
        for request in steps:
            if request.is_backward or not self._at_barrier(request):
                return [request]
        if self.is_computing:  # what may count before the barrier
            return []
        if steps and (self._everybody_contributed() or self._deadline(steps) <= self._clock()):
            self._pass_barrier()
            return [steps[0]]
        return []

    def _turn(self) -> list[_Request]:
        """The next request of the client whose turn it is."""
        own = [request for request in self._ready if request.client == self._turns[0]]
        if not own:
            return []
        self._turns.append(self._turns.pop(0))
        return [min(own, key=lambda r: (r.packet.key.place, r.is_backward, r.packet.key.micro))]

    def _held_up(self) -> list[list[_Request]]:
        """Requests that wait for those of other clients, in groups that are served at once.

        Of those gathered, a group has each step once, and one forward of a client: what comes again waits, and is a
        repeat as soon as the first is answered.
        """
        steps = [request for request in self._ready if request.is_step]
        if self._schedule.gathers:
            flights: dict[object, dict[StepKey, _Request]] = {}
            for request in (r for r in steps if r.is_backward and not r.packet.clips):
                flights.setdefault(self._flight(request), {}).setdefault(request.packet.key, request)
            forwards: dict[int, _Request] = {}
            for request in sorted((r for r in steps if not r.is_backward), key=lambda r: r.packet.key.place):
                forwards.setdefault(request.client, request)
            return [*(list(group.values()) for group in flights.values()), list(forwards.values())]
        return [steps] if self._schedule.sums else []

    def _flight(self, request: _Request) -> object:
        """What tells its flight from others; a request that will be refused stands alone."""
        try:
            return id(self.server.steps.held(request.packet.key))
        except RefusedStep:
            return request

    def _gather(self) -> list[_Request]:
        """All requests that are computed as one, once they are there or the others are late.

        What a gradient is to be scaled by is of no flight: it stands alone, and waits for nobody.
        """
        if scales := [request for request in self._ready if request.packet.clips]:
            return scales[:1]
        *flights, forwards = self._held_up()
        for group in flights:
            members = self.server.companions(group[0].packet.key)
            if {r.client for r in group} >= members & self._active or self._late(group, members):
                return group
        if forwards and ({r.client for r in forwards} >= self._active or self._late(forwards, self._active)):
            # Who was sent away for want of room comes first, or it might be so for ever.
            forwards.sort(key=lambda r: (-self._sent_away[r.client], r.client))
            return [r for r in forwards if _like(r.packet) == _like(forwards[0].packet)]
        return []

    def _late(self, group: Sequence[_Request], members: set[int]) -> bool:
        """Whether a group has waited long enough; the others are left behind."""
        if self._deadline(group) > self._clock():
            return False
        self._active -= members - {request.client for request in group}
        return True

    def _at_barrier(self, request: _Request) -> bool:
        return self._schedule.sums and self._every > 0 and self._contributed[request.client] >= self._every

    def _everybody_contributed(self) -> bool:
        return all(self._contributed[client] >= self._every for client in self._active)

    def _pass_barrier(self) -> None:
        self._active &= {client for client, count in self._contributed.items() if count >= self._every}
        self._contributed.clear()
        self.server.learners.close_window()

    def _serve(self, chosen: Sequence[_Request]) -> None:
        """Begins what was chosen; without lanes, to its end."""
        packets = [request.packet for request in chosen]
        if chosen[0].is_question:
            self._land(chosen, outcome(lambda: [self.server.ask(packets[0])]))
            return
        begin = self.server.begin_backward if chosen[0].is_backward else self.server.begin_forward
        work = outcome(lambda: begin(packets))
        if isinstance(work, Exception):
            self._land(chosen, work)
        elif self._lanes is None:
            self._land(chosen, outcome(work.done))
        else:
            self._under_way.append(chosen)
            self._lanes.start(chosen[0].lane, work.compute, lambda made: self._come_back(chosen, work, made))

    def _come_back(self, chosen: Sequence[_Request], work: Work, made: Any) -> None:
        """A lane has computed something."""
        self._under_way.remove(chosen)
        self._land(chosen, made if isinstance(made, Exception) else outcome(lambda: work.finish(made)))

    def _land(self, chosen: Sequence[_Request], answers: Sequence[Answer] | Exception) -> None:
        """Gives everyone their answer, or says why there is none."""
        if isinstance(answers, SpoiledTogether):
            for request in chosen:
                if (refusal := answers.refused.get(request.packet.key)) is not None:
                    request.done(refusal)
            if rest := [request for request in chosen if request.packet.key not in answers.refused]:
                self._serve(rest)
            return
        if isinstance(answers, RefusedStep) and len(chosen) > 1:
            for request in chosen:  # one spoils it for all: each on its own, so that only that one is refused
                self._serve([request])
            return
        if isinstance(answers, Exception):  # theirs to know: it must not end the thread that serves everybody
            answers = [answers] * len(chosen)
        for request, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Packet):
                self._remember(request, answer)
            request.done(answer)

    def _remember(self, request: _Request, answer: Packet) -> None:
        if answer.wait:
            self._sent_away[request.client] += 1
            self._active.discard(request.client)  # those who wait for it may have what it waits for
        elif self._sent_away.pop(request.client, None) and request.packet.training:
            self._active.add(request.client)
        packet = request.packet
        if request.repeats:
            return
        if packet.clips if self.server.learners.clips else request.is_backward and packet.ends:
            self._contributed[request.client] += 1


def _like(packet: Packet) -> tuple[bool, str]:
    """Returns what forwards that are computed as one have in common: what comes back, and the hidden states' type.

    Joined with wider ones of somebody else, hidden states would be computed with in another type.
    """
    hidden = packet.tensors.get("hidden")
    return packet.wants_gradient, hidden.dtype if hidden else ""
