"""Virtual time of a run: replays each phase on the run's network, and decides who would have come too late."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedsplit.adaptation.run_adapters import outlined
from fedsplit.events.event_types import Cause, RoundReplayed
from fedsplit.formatting import counted, plain_number, virtual_duration
from fedsplit.model.flops import Flops, flops_of
from fedsplit.model.parts import Part
from fedsplit.network.compute import Compute, Operations, StatedCompute, Task, read_recorded
from fedsplit.network.fleet import read_fleet
from fedsplit.network.replay import ClientPhase, Field, replay
from fedsplit.network.times import PLACES, ClientTime, PhaseTime, stragglers_of
from fedsplit.network.trace import Crossing, settled
from fedsplit.network.trunk_queue import Discipline
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.trunk.replicated import replicas_of
from fedsplit.trunk.schedules import SCHEDULES


class VirtualTime:
    """The virtual clock of a run.

    Attributes:
        field: Links, devices and trunk.
    """

    def __init__(self, config: Config, names: Sequence[str]) -> None:
        """Assigns a profile to each client.

        Args:
            config: Configuration of the run, with a network.
            names: Names of the clients, by number.

        Raises:
            InputError: The network lists a client that does not exist.
        """
        fleet = read_fleet(config.network.profile)
        schedule = SCHEDULES[config.trunk.schedule]
        several = config.trunk.replicas > 1
        lanes = max(1, config.trunk.lanes)
        self._config = config
        self.field = Field(
            fleet.profiles(names, config.seed),
            fleet.trunk,
            compute_of(config),
            Discipline(schedule.gathers, schedule.sums, config.trunk.every, lanes),
            config.seed,
            replicas_of(config.clients, config.trunk.replica_weights) if several else (),
        )

    def unavailable(self, round: int, clients: Iterable[int]) -> dict[int, str]:
        """Returns the clients that take no part in a round, with the reason. The seed decides, client by client."""
        missing = {}
        for client in clients:
            availability = self.field.profiles[client].availability
            # A seed has 63 bits, so that the quotient is a draw between 0 and 1.
            drawn = derive_seed(self._config.seed, "availability", client, round) / 2**63
            if drawn >= availability:
                missing[client] = f"it is not available (availability {plain_number(availability)})"
        return missing

    def replay(self, phases: Mapping[int, ClientPhase], round: int, phase: str) -> PhaseTime:
        """Returns when each client's answer is at the server; see `fedsplit.network.replay.replay`."""
        return replay(self.field, phases, round, phase)

    def training(
        self,
        phases: Mapping[int, ClientPhase],
        round: int,
        usable: Collection[int],
        unavailable: Sequence[int],
    ) -> TrainingTime:
        """Returns the training of a round in virtual time.

        Args:
            phases: Work of the clients that have answered.
            round: Number of the round.
            usable: Clients whose update can be used.
            unavailable: Clients that were asked and not available.
        """
        return self.training_of(self.replay(phases, round, "training"), usable, unavailable)

    def training_of(self, phase: PhaseTime, usable: Collection[int], unavailable: Sequence[int]) -> TrainingTime:
        """Returns the training of a round whose replay is known. For the arguments see `training`."""
        usable_arrivals = {client: phase.arrivals[client] for client in sorted(usable)}
        late = self._late(usable_arrivals)
        in_time = {client: at for client, at in usable_arrivals.items() if client not in late}
        surplus = self._surplus(in_time)
        end = self._end_of_training(phase.arrivals, late.keys() | surplus.keys())
        return TrainingTime(phase, end, late, surplus, unavailable)

    def _late(self, arrivals: Mapping[int, float]) -> dict[int, str]:
        """Returns the clients that miss the deadline of the round, with the reason.

        Args:
            arrivals: Virtual seconds until a client's update is at the server, by client.
        """
        deadline = self._config.round_deadline
        late = {}
        for client, seconds in sorted(arrivals.items()):
            if deadline and seconds > deadline:
                after = virtual_duration(seconds, unlike=deadline)
                limit = virtual_duration(deadline, unlike=seconds)
                late[client] = f"its update would arrive after {after} of virtual time, and the deadline is {limit}"
        return late

    def _surplus(self, arrivals: Mapping[int, float]) -> dict[int, str]:
        """Returns the clients that over-selection asked and did not need, with the reason.

        Args:
            arrivals: Virtual seconds until a client's update is at the server, by client that meets the deadline.
        """
        config = self._config
        if config.network.over_select <= 1:
            return {}
        # The number of the client decides between equal arrivals.
        order = sorted(arrivals, key=lambda client: (arrivals[client], client))
        enough = counted(config.sampled, "update is", "updates are") + " needed"
        surplus = {}
        for client in sorted(order[config.sampled :]):
            after = virtual_duration(arrivals[client])
            surplus[client] = f"{enough}, and arrived before its own, which would arrive after {after} of virtual time"
        return surplus

    def _end_of_training(self, arrivals: Mapping[int, float], unused: Collection[int]) -> float:
        """Returns the virtual seconds after which the server aggregates.

        Args:
            arrivals: Virtual seconds until a client's update is at the server, by client.
            unused: Clients whose update is late or surplus.
        """
        of_used = [seconds for client, seconds in arrivals.items() if client not in unused]
        last = max(of_used, default=0.0)
        misses_deadline = any(seconds > self._config.round_deadline for seconds in arrivals.values())
        # The server cannot know that nobody else will come, unless enough have.
        used = len(arrivals) - len(unused)
        has_enough = self._config.network.over_select > 1 and used >= self._config.sampled
        if self._config.round_deadline and misses_deadline and not has_enough:
            return self._config.round_deadline
        return last


@dataclass
class PhaseTraffic:
    """What a phase sends between server and clients, noted while the phase is under way.

    Attributes:
        down: Bytes of the last request to each client.
        up: Bytes of the answer of each client that has answered.
    """

    down: dict[int, int] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)

    def phases(self, crossings: Iterable[Crossing], round: int) -> dict[int, ClientPhase]:
        """Returns the work of the clients that have answered.

        Args:
            crossings: The trunk's trace.
            round: Number of the round.
        """
        by_client = settled(crossings, round, self.up.keys())
        phases = {}
        for client in sorted(self.up):
            phases[client] = ClientPhase(self.down[client], self.up[client], by_client[client])
        return phases


@dataclass(frozen=True)
class TrainingTime:
    """The training of a round in virtual time.

    Attributes:
        phase: Arrivals of the clients, and where their time went.
        seconds: Virtual seconds until the server aggregates.
        late: Clients whose update missed the deadline, with the reason.
        surplus: Clients that over-selection asked and did not need, with the reason.
        unavailable: Clients that were asked and not available.
    """

    phase: PhaseTime
    seconds: float
    late: Mapping[int, str]
    surplus: Mapping[int, str]
    unavailable: Sequence[int]

    @property
    def unused(self) -> dict[int, tuple[Cause, str]]:
        """Clients whose update is late or surplus, with cause and reason."""
        unused: dict[int, tuple[Cause, str]] = {}
        for client, reason in self.late.items():
            unused[client] = "late", reason
        for client, reason in self.surplus.items():
            unused[client] = "surplus", reason
        return dict(sorted(unused.items()))


@dataclass
class VirtualTotals:
    """Virtual time of a run so far.

    Attributes:
        training: Virtual seconds of all trainings.
        evaluation: Virtual seconds of all evaluations.
        places: Sums over clients and rounds of the virtual seconds by place, as in `fedsplit.network.times.PLACES`.
        late: Number of updates that missed the deadline.
        surplus: Number of updates that over-selection asked for and did not need.
        unavailable: Number of requests to clients that were not available.
        stragglers: Number of rounds in which a client was a straggler, by its name.

    Example:
        >>> totals = VirtualTotals(training=3.0, evaluation=1.0)
        >>> totals.seconds, VirtualTotals(**totals.document()) == totals
        (4.0, True)
    """

    training: float = 0.0
    evaluation: float = 0.0
    places: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PLACES, 0.0))
    late: int = 0
    surplus: int = 0  # by default, for a checkpoint of a version that counted these among the late ones
    unavailable: int = 0
    stragglers: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Virtual seconds of all rounds."""
        return self.training + self.evaluation

    def document(self) -> dict[str, object]:
        """Returns the totals as plain values."""
        return {**vars(self), "places": dict(self.places), "stragglers": dict(self.stragglers)}

    def copy(self) -> VirtualTotals:
        """Returns an independent copy."""
        return VirtualTotals(**self.document())  # type: ignore[arg-type]  # its own fields

    def summary(self) -> dict[str, object]:
        """Returns the totals under their keys in summary.json."""
        return {"seconds": self.seconds, **self.document()}

    def add(self, event: RoundReplayed) -> None:
        """Adds a round."""
        self.training += event.training_seconds
        self.evaluation += event.evaluation_seconds
        for spent in event.clients.values():
            for place, seconds in spent.items():
                self.places[place] += seconds
        self.late += len(event.late)
        self.surplus += len(event.surplus)
        self.unavailable += len(event.unavailable)
        for name in event.stragglers:
            self.stragglers[name] = self.stragglers.get(name, 0) + 1


def round_event(
    round: int,
    before: float,
    names: Sequence[str],
    training: TrainingTime | None,
    evaluation: PhaseTime | None,
) -> RoundReplayed:
    """Returns the event that reports a round in virtual time.

    Args:
        round: Number of the round; 0 before training.
        before: Virtual seconds of all earlier rounds.
        names: Names of the clients, by number.
        training: The training; None for a round without one.
        evaluation: The evaluation; None for a round without one.
    """
    spent: dict[int, ClientTime] = {}
    training_seconds = 0.0 if training is None else training.seconds
    evaluation_seconds = 0.0 if evaluation is None else evaluation.end
    arrivals: dict[int, float] = {}
    if training is not None:
        unused = training.unused
        arrivals = {client: at for client, at in training.phase.arrivals.items() if client not in unused}
        _add_phase(spent, {client: training.phase.spent[client] for client in arrivals}, arrivals, training_seconds)
    if evaluation is not None:
        _add_phase(spent, evaluation.spent, evaluation.arrivals, evaluation_seconds)
    everybody = {} if training is None else training.phase.arrivals
    return RoundReplayed(
        round=round,
        seconds=training_seconds + evaluation_seconds,
        training_seconds=training_seconds,
        evaluation_seconds=evaluation_seconds,
        virtual_elapsed=before + training_seconds + evaluation_seconds,
        clients={names[client]: dict(time.seconds) for client, time in sorted(spent.items())},
        arrivals={names[client]: seconds for client, seconds in sorted(everybody.items())},
        stragglers=[names[client] for client in stragglers_of(everybody)],
        late=[] if training is None else [names[client] for client in training.late],
        surplus=[] if training is None else [names[client] for client in training.surplus],
        unavailable=[] if training is None else [names[client] for client in training.unavailable],
    )


def _add_phase(
    spent: dict[int, ClientTime],
    phase: Mapping[int, ClientTime],
    arrivals: Mapping[int, float],
    end: float,
) -> None:
    """Adds the time of clients in a phase. From its arrival to the end of the phase, a client waits for the others."""
    for client, time in phase.items():
        total = spent.setdefault(client, ClientTime())
        total.add_all(time)
        total.add("others", max(0.0, end - arrivals[client]))


def compute_of(config: Config) -> Compute:
    """Returns the compute times of a run: recorded ones if the settings name them, else from the parts' operations.

    Raises:
        SettingError: The recorded times are wrong.
    """
    if config.network.compute:
        return read_recorded(config.network.compute)
    speeds = config.network
    return StatedCompute(operations_of(config), speeds.client_tflops * 1e12, speeds.trunk_tflops * 1e12)


def operations_of(config: Config) -> Operations:
    """Returns the numbers of operations of a run's parts."""
    parts: dict[str, Part] = {}

    # A run has few different shapes of batches, and each is counted once.
    @functools.cache
    def flops(kind: str, rows: int, length: int) -> Flops:
        if kind not in parts:
            parts[kind] = outlined(config, kind)  # type: ignore[arg-type]  # the name of a part
        part = parts[kind]
        # A length at the cut includes the virtual tokens, which `flops_of` adds by itself.
        return flops_of(part, rows, max(1, length - part.virtual))

    def operations(task: Task, rows: int, length: int) -> float:
        kind, _, direction = task.partition("-")
        found = flops(kind, rows, length)
        return found.forward if direction == "forward" else found.backward

    return operations
