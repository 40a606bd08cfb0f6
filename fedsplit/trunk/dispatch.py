"""Order of the trunk's work: turns, gathering, barriers, and deadlines for late clients."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from fedsplit.clock import Clock
from fedsplit.settings.sections import TrunkSettings
from fedsplit.trunk.requests import Answer, Done, Request, first_forwards, joinable
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.trunk.status import RoundCounts
from fedsplit.trunk.workers import BACKWARD, Work, Workers, outcome
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.packets import Packet, StepKey, check_form
from fedsplit.wire.steps import RefusedStep, SpoiledStep, SpoiledTogether, StaleStep


class Dispatcher:
    """Decides in which order the trunk serves the requests of its clients.

    Repeats, evaluations, admission requests, steps from which the trunk does not learn, and forwards through the base
    weights alone are served on arrival.
    Gradients are served before new forwards, since a gradient frees memory. The schedule decides the rest:

    - `batched`: a forward waits until every active client has sent a forward, and a gradient waits until all
      gradients of the batch have come;
    - `accumulate`: a client with `every` steps since the last barrier waits at the barrier for the active clients;
    - `--deterministic`: clients train in groups. Under `shared` the members of a group take turns, request by
      request, in a fixed order. Under `batched` and `accumulate` nothing is served before the last member has come.

    A client is active from the first forward of a round (in a group, from the start of the round) until `leave`.
    A client that has not come by the deadline is left behind: nobody waits for the client until the next request.

    With workers, one forward and one backward are computed at the same time, and `advance` returns before the results
    are ready. A forward sees the snapshot of the adapter that is newest when the forward begins. Other calls of
    dispatcher and trunk must wait until no worker computes; `leave` must wait for work of the leaving client only.

    Not thread-safe: one thread makes all calls, and the callbacks `done` run on the same thread.
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
            workers: Workers for forwards and backwards. Without workers, `advance` computes both, one after the other.
        """
        self.server = server
        self._clock = clock
        self._workers = workers
        self._schedule = SCHEDULES[settings.schedule]
        self._patience = settings.deadline
        self._every = settings.every
        self._under_way: list[Sequence[Request]] = []  # batches that workers compute now
        self._waiting: list[Request] = []
        self._active: set[int] = set()
        self._contributed: Counter[int] = Counter()  # finished steps since the last barrier
        self._sent_away: Counter[int] = Counter()  # refusals for want of memory since a client was last admitted
        self._turns: list[int] = []
        self._grouped = False
        self._group: set[int] = set()

    @property
    def is_computing(self) -> bool:
        """True while a worker computes."""
        return bool(self._under_way)

    def computes_for(self, client: int) -> bool:
        """Returns True while a worker computes for a client. Until then the client cannot leave."""
        requests = itertools.chain.from_iterable(self._under_way)
        return any(request.client == client for request in requests)

    def _is_busy(self, worker: str) -> bool:
        return any(requests[0].worker == worker for requests in self._under_way)

    def begin(self, group: Sequence[int]) -> None:
        """Makes clients a group that trains together. Until `end_round`, training of further clients is refused.

        Args:
            group: The clients, in the order of the turns.
        """
        # Schedules that gather or sum wait for the whole group, so the order of arrival changes nothing there.
        takes_turns = not (self._schedule.gathers or self._schedule.sums)
        self._grouped = True
        self._group = set(group)
        self._active = set(group)
        self._turns = list(group) if takes_turns else []
        self._attend()

    def submit(self, packet: Packet, done: Done) -> None:
        """Queues a request, or refuses the request at once if the trunk can never serve the packet.

        Args:
            packet: The request.
            done: Called from `advance` with the answer, or with the error in place of an answer.
        """
        try:
            check_form(packet)
            self._check_group(packet)
        except (MalformedPacket, RefusedStep) as error:
            done(error if isinstance(error, RefusedStep) else SpoiledStep(str(error)))
            return
        request = Request(packet, self._clock(), done)
        self._waiting.append(request)
        is_training_forward = packet.training and not request.is_backward
        if is_training_forward and not self._grouped:
            self._active.add(request.client)
            self._attend()

    def _attend(self) -> None:
        """Tells the adapters whether clients train, since further replicas of the trunk may wait for them."""
        self.server.adapters.attend(bool(self._active))

    def _check_group(self, packet: Packet) -> None:
        """Refuses training of clients outside the group, who would wait for ever: no turn is theirs.

        Raises:
            StaleStep: The packet trains for a client that is not in the group, or has left the group.
        """
        request = Request(packet, 0.0, lambda answer: None)  # for its properties only
        if self._grouped and request.is_step and request.client not in self._group:
            raise StaleStep(f"{packet.key}: its client does not train now")

    def leave(self, client: int) -> None:
        """Ends the round of a client that has finished or is dead. No request waits for the client from then on."""
        self._active.discard(client)
        self._attend()
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
        waiting = {request.client for request in self._waiting}
        # `leave` also answers what still waits. Otherwise the caller of a late request would wait for ever.
        for client in waiting | self._active:
            self.leave(client)
        self._grouped = False
        self._group = set()
        self._turns = []
        return self.server.end_round(finished)

    def advance(self) -> bool:
        """Serves the next request or batch of requests. Returns False if every request has to wait."""
        # A batch stays pending while its backward is computed. Its lease must not run out under the worker.
        if not self._is_busy(BACKWARD):
            self.server.expire()
        chosen = self._choose()
        if not chosen:
            return False
        self._waiting = [request for request in self._waiting if request not in chosen]
        self._serve(chosen)
        return True

    def wakes_at(self) -> float | None:
        """Returns the time of the next deadline or expiry, which may give `advance` work without a new request."""
        times = [self._deadline(group) for group in self._held_up() if group]
        expiry = None if self._is_busy(BACKWARD) else self.server.steps.next_expiry()
        if expiry is not None:
            times.append(expiry)
        return min((time for time in times if time < math.inf), default=None)

    def _deadline(self, group: Iterable[Request]) -> float:
        """Returns the time after which requests no longer wait. A group of `--deterministic` has no deadline."""
        if self._grouped:
            return math.inf
        first_arrival = min(request.arrived for request in group)
        return first_arrival + self._patience

    @property
    def _ready(self) -> list[Request]:
        """Requests whose worker is free."""
        return [request for request in self._waiting if not self._is_busy(request.worker)]

    def _choose(self) -> list[Request]:
        """Returns the requests to serve next, as one batch. The list is empty where all requests have to wait."""
        for request in self._ready:
            # Asked anew each time: a second copy of a request becomes a repeat once the first copy is answered.
            request.repeats = self.server.is_repeat(request.packet)
            # Served at once, not at a turn: the base weights are the same before and after any step.
            reads_adapter = request.packet.is_adapted
            order_matters = request.teaches or (reads_adapter and request.client in self._turns)
            if request.repeats or request.is_admission or not order_matters:
                return [request]
        if self._turns:
            return self._turn()
        if self._schedule.gathers:
            return self._gather()
        return self._first_step()

    def _first_step(self) -> list[Request]:
        """Returns the first part of a step that need not wait at the barrier, gradients before forwards."""
        steps = [request for request in self._ready if request.teaches]
        steps.sort(key=lambda request: not request.is_backward)  # stable: otherwise the order of arrival stays
        for request in steps:
            if request.is_backward or not self._at_barrier(request):
                return [request]
        if self.is_computing:  # the result may count before the barrier
            return []
        if not steps:
            return []
        is_overdue = self._deadline(steps) <= self._clock()
        if self._everybody_contributed(steps) or is_overdue:
            self._pass_barrier()
            return [steps[0]]
        return []

    def _turn(self) -> list[Request]:
        """Returns the next request of the client at the head of the turns, and moves the client to the end."""
        candidates = [request for request in self._ready if request.client == self._turns[0]]
        if not candidates:
            return []
        self._turns.append(self._turns.pop(0))

        # By key, not by arrival: packets of one client may overtake each other on the way.
        def place(request: Request) -> tuple[object, bool, int]:
            key = request.packet.key
            return key.place, request.is_backward, key.micro

        return [min(candidates, key=place)]

    def _held_up(self) -> list[list[Request]]:
        """Returns the requests that wait for further clients, in groups. All requests of a group are served together.

        Under `batched`, a group has each step once, and one forward of each client. A second copy of a request waits
        until the first copy is answered, and is a repeat from then on.
        """
        steps = [request for request in self._ready if request.teaches]
        if self._schedule.gathers:
            return [*self._gradients_by_batch(steps), first_forwards(steps)]
        return [steps] if self._schedule.sums else []

    def _gradients_by_batch(self, steps: Sequence[Request]) -> list[list[Request]]:
        """Groups gradients by the batch of the forwards."""
        groups: dict[object, dict[StepKey, Request]] = {}
        for request in steps:
            if request.is_backward and not request.packet.clips:
                group = groups.setdefault(self._batch_of(request), {})
                group.setdefault(request.packet.key, request)
        return [list(group.values()) for group in groups.values()]

    def _batch_of(self, request: Request) -> object:
        """Returns an identity of the batch that a gradient belongs to."""
        try:
            return id(self.server.steps.held(request.packet.key))
        except RefusedStep:
            return request  # a group of its own, so that the refusal meets no other client

    def _gather(self) -> list[Request]:
        """Returns all requests of a batch, once all clients have sent a request or the deadline has passed.

        A clipping coefficient belongs to no batch, and waits for nobody.
        """
        coefficients = [request for request in self._ready if request.packet.clips]
        if coefficients:
            return coefficients[:1]

        *batches, forwards = self._held_up()
        for gradients in batches:
            members = self.server.companions(gradients[0].packet.key)
            if self._is_complete(gradients, members):
                return gradients

        if forwards and self._is_complete(forwards, self._active):
            # A client that was refused for want of memory comes first. Otherwise the client might starve.
            forwards.sort(key=lambda request: (-self._sent_away[request.client], request.client))
            kind = joinable(forwards[0].packet)
            return [request for request in forwards if joinable(request.packet) == kind]
        return []

    def _is_complete(self, group: Sequence[Request], members: set[int]) -> bool:
        """Returns True if a group has a request of every active member, or has waited until the deadline.

        Members without a request at the deadline are left behind.
        """
        present = {request.client for request in group}
        return present >= members & self._active or self._late(group, members)  # nobody waits for who has left

    def _late(self, group: Sequence[Request], members: set[int]) -> bool:
        """Returns True if the deadline of a group has passed. The missing members are then left behind."""
        if self._deadline(group) > self._clock():
            return False
        self._active -= members - {request.client for request in group}
        return True

    def _at_barrier(self, request: Request) -> bool:
        """Returns True if the client has made all steps before the barrier. With `every` 0, the round is one window."""
        has_barriers = self._schedule.sums and self._every > 0
        return has_barriers and self._contributed[request.client] >= self._every

    def _everybody_contributed(self, waiting: Sequence[Request]) -> bool:
        """Returns True if each active client has contributed to the barrier.

        In a group, each client must also wait at the barrier. Otherwise an evaluation would see the snapshot before or
        after the barrier, depending on the time of arrival.
        """
        if self._grouped and self._active - {request.client for request in waiting}:
            return False
        return all(self._contributed[client] >= self._every for client in self._active)

    def _pass_barrier(self) -> None:
        """Makes the optimiser's step, and leaves clients behind that have not contributed enough."""
        contributors = {client for client, count in self._contributed.items() if count >= self._every}
        self._active &= contributors
        self._contributed.clear()
        self.server.adapters.close_window()

    def _serve(self, chosen: Sequence[Request]) -> None:
        """Begins to serve requests; without workers, serves them to the end."""
        packets = [request.packet for request in chosen]
        if chosen[0].is_admission:
            answers = outcome(lambda: [self.server.ask(packets[0])])
            self._settle(chosen, answers)
            return
        begin = self.server.begin_backward if chosen[0].is_backward else self.server.begin_forward
        work = outcome(lambda: begin(packets))
        if isinstance(work, Exception):
            self._settle(chosen, work)
        elif self._workers is None:
            self._settle(chosen, outcome(work.done))
        else:
            self._under_way.append(chosen)
            finish = functools.partial(self._finish, chosen, work)
            self._workers.start(chosen[0].worker, work.compute, finish)

    def _finish(self, chosen: Sequence[Request], work: Work, result: object) -> None:
        """Finishes work that a worker has computed."""
        self._under_way.remove(chosen)
        answers = result if isinstance(result, Exception) else outcome(lambda: work.finish(result))
        self._settle(chosen, answers)

    def _settle(self, chosen: Sequence[Request], answers: Sequence[Answer] | Exception) -> None:
        """Gives each request an answer, or the error in place of an answer."""
        if isinstance(answers, SpoiledTogether):
            self._serve_without(chosen, answers)
            return
        if isinstance(answers, RefusedStep) and len(chosen) > 1:
            # One request spoils the batch, and the error does not say which. Alone, only that request is refused.
            for request in chosen:
                self._serve([request])
            return
        # Any error goes to the clients. Raised here, the error would end the thread that serves all clients.
        if isinstance(answers, Exception):
            answers = [answers] * len(chosen)
        for request, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Packet):
                self._remember(request, answer)
            request.done(answer)

    def _serve_without(self, chosen: Sequence[Request], spoiled: SpoiledTogether) -> None:
        """Refuses the spoiled requests of a batch, and serves the rest."""
        rest = []
        for request in chosen:
            refusal = spoiled.refused.get(request.packet.key)
            if refusal is None:
                rest.append(request)
            else:
                request.done(refusal)
        if rest:
            self._serve(rest)

    def _remember(self, request: Request, answer: Packet) -> None:
        """Records an answer for the groups: clients that were refused, and clients that contributed to the barrier."""
        if answer.wait:
            self._sent_away[request.client] += 1
            # A deadlock otherwise: active clients would wait for this client, and hold the memory that it needs.
            self._active.discard(request.client)
        elif self._sent_away.pop(request.client, None) and request.packet.training:
            self._active.add(request.client)  # admitted after all, so others wait for the client again
        if request.repeats:
            return
        packet = request.packet
        # With clipping, the gradient is used only when the coefficient comes.
        ends_step = packet.clips if self.server.adapters.clips else request.is_backward and packet.ends
        if ends_step and packet.learns:
            self._contributed[request.client] += 1
