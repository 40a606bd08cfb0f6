"""The virtual clock: replays a round's trace on links and devices, as a discrete-event simulation with SimPy.

Every client is a process that follows `fedsplit.client.split_step`: the bottom's forwards, micro-batch by micro-batch,
each sent without waiting; then for each answer the top, whose gradient is sent without waiting; then for each gradient
the bottom's backward. All clients of a round begin at the same time, however few processes play them in the run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedsplit.network.compute import Compute, Task
from fedsplit.network.fair_share import SharedLink
from fedsplit.network.fleet import TrunkLink
from fedsplit.network.profiles import Profile
from fedsplit.network.times import ClientTime, PhaseTime
from fedsplit.network.trace import Crossing
from fedsplit.network.trunk_queue import Discipline, Job, TrunkQueue
from fedsplit.seeds import derive_seed

if TYPE_CHECKING:
    import simpy

Steps = Generator[Any, Any, None]
"""A process of SimPy: yields events, and goes on when they have happened."""


@dataclass(frozen=True)
class ClientPhase:
    """What one client does in a phase of a round.

    Attributes:
        bytes_down: Bytes of the server's request, such as adapters.
        bytes_up: Bytes of the client's answer.
        crossings: Messages to the trunk in a fixed order.
    """

    bytes_down: int
    bytes_up: int
    crossings: Sequence[Crossing] = ()


@dataclass(frozen=True)
class Field:
    """Everything that a phase is replayed on.

    Attributes:
        profiles: Profile of each client, by number.
        link: The trunk's own link; each replica of the trunk has one.
        compute: Compute times.
        discipline: Order in which the trunk serves messages.
        seed: Seed of the run, for jitter.
        replica_of: Replica of each client, by number; empty for a single trunk.
    """

    profiles: Sequence[Profile]
    link: TrunkLink
    compute: Compute
    discipline: Discipline = field(default_factory=Discipline)
    seed: int = 0
    replica_of: Sequence[int] = ()

    def replica(self, client: int) -> int:
        """Returns the number of a client's replica."""
        return self.replica_of[client] if self.replica_of else 0


def replay(place: Field, phases: Mapping[int, ClientPhase], round: int, phase: str) -> PhaseTime:
    """Returns when each client's answer is at the server, and where the client's time went.

    Args:
        place: Links, devices and trunk.
        phases: Work of the clients, by number.
        round: Number of the round, for jitter.
        phase: Name of the phase, for jitter.

    Example:
        >>> from fedsplit.network.compute import RecordedCompute
        >>> field = Field([Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=100)], TrunkLink(), RecordedCompute({}))
        >>> replay(field, {0: ClientPhase(bytes_down=1_000_000, bytes_up=500_000)}, round=1, phase="training").arrivals
        {0: 1.6}
    """
    # Here, since SimPy is an optional extra that runs without a network do not need.
    import simpy

    env = simpy.Environment()
    clips = any(crossing.kind == "coefficient" for one in phases.values() for crossing in one.crossings)
    trunks = {}
    # Each replica has a queue and links of its own: its clients do not slow those of another one.
    for replica in sorted({place.replica(client) for client in phases}):
        clients = [client for client in phases if place.replica(client) == replica]
        # A client with held-out text alone takes part in no barrier, and nobody waits for it.
        training = [client for client in clients if any(c.kind == "forward" for c in phases[client].crossings)]
        queue = TrunkQueue(env, place.discipline, training, clips)
        up = sum(place.profiles[client].uplink_bytes for client in clients)
        down = sum(place.profiles[client].downlink_bytes for client in clients)
        link = (
            SharedLink(env, place.link.from_clients, up),
            SharedLink(env, place.link.to_clients, down),
        )
        trunks[replica] = (queue, link)
    runs = {}
    # In the order of their numbers, since SimPy serves events of one moment in the order in which they were made.
    for client in sorted(phases):
        queue, (up_link, down_link) = trunks[place.replica(client)]
        profile = place.profiles[client]
        jitter = ("jitter", client, round, phase)
        uplink = Channel(env, up_link, profile.uplink_bytes, profile, place.seed, (*jitter, "up"))
        downlink = Channel(env, down_link, profile.downlink_bytes, profile, place.seed, (*jitter, "down"))
        run = _ClientRun(env, place.compute, profile, uplink, downlink, queue)
        env.process(run.play(client, phases[client]))
        runs[client] = run
    env.run()
    arrivals = {client: run.arrival for client, run in runs.items()}
    return PhaseTime(arrivals, {client: run.time for client, run in runs.items()})


class Channel:
    """One direction of a client's link: carries one message after the other, and keeps their order."""

    def __init__(
        self,
        env: simpy.Environment,
        link: SharedLink,
        rate: float,
        profile: Profile,
        seed: int,
        place: tuple[object, ...],
    ) -> None:
        """Starts idle.

        Args:
            env: Environment with the virtual clock.
            link: The trunk's link in the same direction.
            rate: Bandwidth of the client in bytes a second.
            profile: Latency, jitter and loss.
            seed: Seed of the run.
            place: Name of the channel, for the jitter's draws.
        """
        import simpy

        self._env = env
        self._link = link
        self._rate = rate
        self._profile = profile
        self._seed = seed
        self._place = place
        self._line = simpy.Resource(env, capacity=1)
        self._last_arrival = 0.0

    def carry(self, nbytes: int, message: tuple[object, ...]) -> Steps:
        """Carries a message; the process ends with the arrival of the last byte.

        Args:
            nbytes: Bytes of the message.
            message: Name of the message, for the jitter's draw.
        """
        with self._line.request() as turn:
            yield turn
            if nbytes:
                # Lost packets are sent again: the useful part of the bandwidth shrinks by the loss.
                yield self._link.send(nbytes / (1 - self._profile.loss), self._rate)
        # A message must not overtake the one before, however little jitter it draws.
        due = max(self._last_arrival, self._env.now + self._delay(message))
        self._last_arrival = due
        yield self._env.timeout(due - self._env.now)

    def _delay(self, message: tuple[object, ...]) -> float:
        """Returns the latency of a message in seconds: half a round trip, jitter, and the wait for a lost packet."""
        profile = self._profile
        # A derived seed has 63 bits, so that the quotient lies in [0, 1).
        drawn = derive_seed(self._seed, *self._place, *message) / 2**63 if profile.jitter_ms else 0.0
        # The last packet of a message is lost loss / (1 - loss) times on average; each time costs a round trip.
        again = profile.rtt_ms * profile.loss / (1 - profile.loss)
        return (profile.rtt_ms / 2 + profile.jitter_ms * drawn + again) / 1000


class _ClientRun:
    """The process of one client in a phase.

    Attributes:
        time: Where the client's time went so far.
        arrival: Time at which the client's answer was at the server.
    """

    def __init__(
        self,
        env: simpy.Environment,
        compute: Compute,
        profile: Profile,
        uplink: Channel,
        downlink: Channel,
        trunk: TrunkQueue,
    ) -> None:
        self._env = env
        self._compute = compute
        self._profile = profile
        self._uplink = uplink
        self._downlink = downlink
        self._trunk = trunk
        self.time = ClientTime()
        self.arrival = 0.0

    def play(self, client: int, phase: ClientPhase) -> Steps:
        """Plays a phase: request, steps, held-out text, answer."""
        yield from self._carry_alone(self._downlink, phase.bytes_down, "wire_down")
        training = [one for one in phase.crossings if one.kind in ("forward", "backward", "coefficient")]
        keys = {(one.step, one.batch, one.micro) for one in training}
        # References beside a training step belong to it; all others belong to held-out text. Held-out batches are
        # numbered like steps, and are measured after the steps: the first reference of a key is that of the step.
        references: dict[tuple[int, int, int], Crossing] = {}
        for one in phase.crossings:
            key = (one.step, one.batch, one.micro)
            if one.kind == "reference" and key in keys:
                references.setdefault(key, one)
        for _, group in groupby(training, key=lambda one: (one.step, one.batch)):
            yield from self._batch(list(group), references)
        self._trunk.leave(client)
        # By identity, since a reference of held-out text may equal one beside a training step in all fields.
        beside = {id(one) for one in references.values()}
        for one in phase.crossings:
            if one.kind in ("evaluation", "reference") and id(one) not in beside:
                yield from self._evaluation(one)
        yield from self._carry_alone(self._uplink, phase.bytes_up, "wire_up")
        self.arrival = self._env.now

    def _batch(
        self,
        crossings: Sequence[Crossing],
        references: Mapping[tuple[int, int, int], Crossing],
    ) -> Steps:
        """Plays one batch of a step, as `SplitStep._cross` does, and the clipping coefficient behind it."""
        forwards = [one for one in crossings if one.kind == "forward"]
        backwards = {one.micro: one for one in crossings if one.kind == "backward"}
        up = []
        # Upwards: nothing is awaited, so that the client computes while earlier micro-batches are on their way.
        for one in forwards:
            yield from self._work("bottom-forward", one)
            reference = references.get((one.step, one.batch, one.micro))
            job = self._send(one, "trunk-forward")
            beside = None
            if reference is not None:
                yield from self._work("bottom-forward", reference)
                beside = self._send(reference, "trunk-forward")
            up.append((one, job, beside))
        gradients = []
        # At the top, in the order of the forwards, whatever answer comes first.
        for one, job, beside in up:
            yield from self._receive(job)
            if beside is not None:
                yield from self._receive(beside)
                yield from self._work("top-forward", beside.crossing)
            yield from self._work("top-forward", one)
            yield from self._work("top-backward", one)
            if one.micro in backwards:
                gradients.append(self._send(backwards[one.micro], "trunk-backward"))
        # All gradients are on their way before the first answer is awaited.
        for job in gradients:
            yield from self._receive(job)
            if job.crossing.returns_gradient:
                yield from self._work("bottom-backward", job.crossing)
        for one in crossings:
            if one.kind == "coefficient":
                yield from self._receive(self._send(one, None))

    def _evaluation(self, crossing: Crossing) -> Steps:
        """Plays a batch of held-out text."""
        yield from self._work("bottom-forward", crossing)
        yield from self._receive(self._send(crossing, "trunk-forward"))
        yield from self._work("top-forward", crossing)

    def _work(self, task: Task, crossing: Crossing) -> Steps:
        """Computes at the client."""
        seconds = self._compute.seconds(task, crossing.rows, crossing.length) / self._profile.compute
        self.time.add("client_compute", seconds)
        yield self._env.timeout(seconds)

    def _carry_alone(self, channel: Channel, nbytes: int, place: str) -> Steps:
        """Waits for a message that no computation overlaps."""
        began = self._env.now
        yield from channel.carry(nbytes, ("adapters",))
        self.time.add(place, self._env.now - began)

    def _send(self, crossing: Crossing, task: Task | None) -> Job:
        """Sends a message to the trunk without waiting.

        Args:
            crossing: The message.
            task: The trunk's computation; None for none.
        """
        seconds = self._compute.seconds(task, crossing.rows, crossing.length) if task else 0.0
        returned = self._env.event()
        served = self._env.event()
        job = Job(crossing, seconds, returned, served, sent=self._env.now)
        self._env.process(self._travel(job))
        return job

    def _travel(self, job: Job) -> Steps:
        """Takes a message to the trunk, through it, and back."""
        one = job.crossing
        name = (one.step, one.batch, one.micro, one.kind)
        yield from self._uplink.carry(one.up, name)
        self._trunk.submit(job)
        yield job.served
        yield from self._downlink.carry(one.down, name)
        job.returned_at = self._env.now
        job.returned.succeed()

    def _receive(self, job: Job) -> Steps:
        """Waits for an answer, and books the wait to the places in which the message was meanwhile."""
        began = self._env.now
        yield job.returned
        assert job.eligible is not None
        stays = (
            ("wire_up", job.sent, job.arrived),
            ("others", job.arrived, job.eligible),
            ("trunk_queue", job.eligible, job.began),
            ("trunk_compute", job.began, job.ended),
            ("wire_down", job.ended, job.returned_at),
        )
        for place, start, end in stays:
            # What passed before the wait began was overlapped by the client's own computing, and is booked there.
            self.time.add(place, max(0.0, end - max(start, began)))
