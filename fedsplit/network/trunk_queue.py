"""The trunk on the virtual clock: one server with a queue, which follows the rules of `fedsplit.trunk.dispatch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsplit.network.trace import Crossing

if TYPE_CHECKING:
    import simpy


@dataclass(frozen=True)
class Discipline:
    """Order in which the trunk serves messages.

    Attributes:
        gathers: True if the steps of all active clients are computed as one batch (`batched`).
        sums: True if gradients are summed until a barrier (`accumulate`).
        every: Steps of a client between two barriers; 0 for no barrier.
        lanes: 2 if a forward and a backward are computed at the same time, else 1.
    """

    gathers: bool = False
    sums: bool = False
    every: int = 0
    lanes: int = 1

    @property
    def has_barriers(self) -> bool:
        """True if clients wait for each other after some steps."""
        return self.sums and self.every > 0


@dataclass(eq=False)
class Job:
    """A message on its way to the trunk and back, with times in virtual seconds.

    Attributes:
        crossing: The message.
        seconds: Time that the trunk computes.
        returned: Event of the answer's arrival at the client.
        served: Event of the end of the computation.
        sent: Time at which the client sent the message.
        arrived: Time of the last byte at the trunk.
        eligible: Time from which the message waits for the trunk alone, and for no other client.
        began: Time at which the trunk began to compute.
        ended: Time at which the trunk ended.
        returned_at: Time of the answer's last byte at the client.
    """

    crossing: Crossing
    seconds: float
    returned: simpy.Event
    served: simpy.Event
    sent: float
    arrived: float = 0.0
    eligible: float | None = None
    began: float = 0.0
    ended: float = 0.0
    returned_at: float = 0.0

    @property
    def is_backward(self) -> bool:
        """True for a gradient and for a clipping coefficient."""
        return self.crossing.kind in ("backward", "coefficient")

    @property
    def teaches(self) -> bool:
        """True for a part of a training step. Other messages are served on arrival."""
        return self.is_backward or self.crossing.kind == "forward"


class TrunkQueue:
    """Serves the messages of one replica of the trunk.

    Messages that do not teach come first, then gradients, then forwards, each in the order of arrival. Under `batched`,
    forwards wait until every active client has sent one, and gradients until all of the batch have come. Under
    `accumulate`, a client with enough steps waits until all active clients have made as many.
    """

    def __init__(
        self,
        env: simpy.Environment,
        discipline: Discipline,
        clients: Collection[int],
        clips: bool,
    ) -> None:
        """Starts without messages.

        Args:
            env: Environment with the virtual clock.
            discipline: Order of the messages.
            clients: Clients that train. They are active until `leave`.
            clips: True if a step ends with a clipping coefficient.
        """
        self._env = env
        self._discipline = discipline
        self._clips = clips
        self._active = set(clients)
        self._waiting: list[Job] = []
        self._busy: set[int] = set()
        self._contributed: Counter[int] = Counter()
        self._batches: dict[tuple[int, int, int, int], frozenset[int]] = {}

    def submit(self, job: Job) -> None:
        """Takes a message that has arrived."""
        job.arrived = self._env.now
        self._waiting.append(job)
        self._serve()

    def leave(self, client: int) -> None:
        """Ends the training of a client. Nobody waits for the client from then on."""
        self._active.discard(client)
        self._contributed.pop(client, None)
        self._serve()

    def _lane_of(self, job: Job) -> int:
        return int(job.is_backward) if self._discipline.lanes > 1 else 0

    def _serve(self) -> None:
        """Begins all work that can begin."""
        while chosen := self._choose():
            self._begin(chosen)

    def _begin(self, chosen: Sequence[Job]) -> None:
        lane = self._lane_of(chosen[0])
        self._busy.add(lane)
        for job in chosen:
            self._waiting.remove(job)
            job.began = self._env.now
            job.eligible = job.arrived if job.eligible is None else job.eligible
        timer = self._env.timeout(sum(job.seconds for job in chosen))
        assert timer.callbacks is not None
        timer.callbacks.append(lambda _: self._end(chosen, lane))

    def _end(self, chosen: Sequence[Job], lane: int) -> None:
        self._busy.discard(lane)
        for job in chosen:
            job.ended = self._env.now
            # With clipping, a step ends with the coefficient, which comes behind the last gradient.
            ends_step = job.crossing.kind == "coefficient" if self._clips else job.is_backward and job.crossing.ends
            if ends_step and job.crossing.learns:
                self._contributed[job.crossing.client] += 1
            job.served.succeed()
        self._serve()

    def _choose(self) -> list[Job]:
        """Returns the messages to compute next, as one batch; none if all have to wait."""
        ready = [job for job in self._waiting if self._lane_of(job) not in self._busy]
        for job in ready:
            if not job.teaches or not job.crossing.learns:
                return [job]
        if self._discipline.gathers:
            return self._gather(ready)
        ready.sort(key=lambda job: not job.is_backward)  # stable: otherwise the order of arrival stays
        for job in ready:
            if job.is_backward or not self._is_held(job):
                return [job]
        return self._pass_barrier(ready)

    def _is_held(self, job: Job) -> bool:
        """Returns True if the client has made all steps before the barrier."""
        return self._discipline.has_barriers and self._contributed[job.crossing.client] >= self._discipline.every

    def _pass_barrier(self, held: Sequence[Job]) -> list[Job]:
        """Lets all clients go on if each active client has made its steps, and returns the first message."""
        if not held or self._busy or any(self._contributed[one] < self._discipline.every for one in self._active):
            return []
        self._contributed.clear()
        for job in held:
            job.eligible = self._env.now
        return [held[0]]

    def _gather(self, ready: Sequence[Job]) -> list[Job]:
        """Returns the messages of a batch, if all of its members have sent one."""
        groups: dict[frozenset[int], dict[int, Job]] = {}
        forwards: dict[int, Job] = {}
        for job in ready:
            client = job.crossing.client
            if not job.is_backward:
                # The first one, since a client may have sent further micro-batches.
                forwards.setdefault(client, job)
            elif job.crossing.kind == "coefficient":
                return [job]
            else:
                groups.setdefault(self._batches[_batch_key(job)], {}).setdefault(client, job)
        for members, group in groups.items():
            # A member that has left sends no gradient any more.
            if group.keys() >= members & self._active:
                return self._together(group)
        if forwards and forwards.keys() >= self._active:
            members = frozenset(forwards)
            for job in forwards.values():
                self._batches[_batch_key(job)] = members
            return self._together(forwards)
        return []

    def _together(self, group: dict[int, Job]) -> list[Job]:
        """Returns the messages of a batch, which wait for nobody from now on."""
        for job in group.values():
            job.eligible = max(one.arrived for one in group.values())
        return [group[client] for client in sorted(group)]


def _batch_key(job: Job) -> tuple[int, int, int, int]:
    """Returns the micro-batch of a message, which a forward and its backward share."""
    crossing = job.crossing
    return crossing.client, crossing.step, crossing.batch, crossing.micro
