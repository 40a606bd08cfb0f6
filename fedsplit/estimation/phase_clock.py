"""The virtual clock of an estimate: a run's own replay, of the messages that the estimate expects.

A phase with many messages is not replayed as a whole. Some of the first steps are, once n and once 2n of them; each
further step takes as long as the second n did on average. Of many clients, every k-th is replayed, in the order of
their lines and devices, with a k-th of the trunk's line and speed; the others come when their neighbour comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedsplit.estimation.crossings import RoundCrossings
from fedsplit.estimation.hardware import Hardware
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.federation.virtual_time import TrainingTime, VirtualTime, operations_of
from fedsplit.network.compute import Compute, StatedCompute, Task, read_recorded
from fedsplit.network.fleet import TrunkLink
from fedsplit.network.replay import ClientPhase, replay
from fedsplit.network.replay import Field as Place
from fedsplit.network.times import ClientTime, PhaseTime
from fedsplit.network.trace import Crossing
from fedsplit.settings.config import Config

HOME = "home"
"""Network of an estimate whose settings name none."""

MOST_CROSSINGS = 4_000
"""Messages of a phase, above which a part of its steps is replayed, and the rest extended."""

MOST_CLIENTS = 50
"""Clients of a phase, above which some are replayed in place of all."""

Crossings = Callable[[Sequence[int]], list[Crossing]]
"""Returns a client's messages, given the sequences of each step."""


@dataclass(frozen=True)
class Limits:
    """How much of a phase is replayed.

    Attributes:
        crossings: Messages of a phase, above which a part of its steps is replayed, and the rest extended.
        clients: Clients of a phase, above which some are replayed in place of all.
    """

    crossings: int = MOST_CROSSINGS
    clients: int = MOST_CLIENTS


@dataclass(frozen=True)
class Field:
    """Where a run would take place. The lines are those of the run's settings.

    Attributes:
        network: Name of the network.
        client: Device of each client with the compute factor 1.
        trunk: Device of the trunk.
    """

    network: str
    client: Hardware
    trunk: Hardware


class Clock:
    """Replays the phases of an estimated run.

    Attributes:
        virtual: The virtual clock that a run would have.
        extends: True if a phase was too long to be replayed as a whole.
        thins: True if a phase had too many clients to replay all of them.

    Example:
        >>> from fedsplit.estimation.hardware import HARDWARE
        >>> from fedsplit.settings.documents import build
        >>> parties = Parties(build({"clients": 2, "train.steps": 1}))
        >>> clock = Clock(parties, StepTraffic(parties), compute_on(parties, HARDWARE["laptop"], HARDWARE["a100"]))
        >>> two = {0: 1000, 1: 1000}
        >>> clock.training(1, two, two).seconds > clock.evaluation(1, two).end
        False
    """

    def __init__(
        self,
        parties: Parties,
        counted: StepTraffic,
        compute: Compute,
        limits: Limits | None = None,
    ) -> None:
        """Takes what decides about the seconds.

        Args:
            parties: The parties of a run.
            counted: Bytes of steps and evaluations.
            compute: Compute times.
            limits: How much of a phase is replayed; None for the usual limits.

        Raises:
            InputError: The network lists a client that does not exist.
        """
        config = with_network(parties.config)
        self.virtual = VirtualTime(config, [f"client {number}" for number in range(config.clients)])
        self.virtual.field = replace(self.virtual.field, compute=compute)
        self.extends = False
        self.thins = False
        self._limits = limits or Limits()
        self._crossings = RoundCrossings(parties, counted)

    def training(
        self,
        round: int,
        down: Mapping[int, int],
        up: Mapping[int, int],
        unavailable: Sequence[int] = (),
    ) -> TrainingTime:
        """Returns the training of a round, with the clients that would come too late.

        Args:
            round: Number of the round.
            down: Bytes of the request to each client.
            up: Bytes of each client's answer.
            unavailable: Clients that were asked and not available.
        """
        phase = self._phase(self._crossings.training, self._crossings.sizes, down, up, round, "training")
        return self.virtual.training_of(phase, down.keys(), unavailable)

    def evaluation(self, round: int, down: Mapping[int, int]) -> PhaseTime:
        """Returns the evaluation of a round.

        Args:
            round: Number of the round.
            down: Bytes of the request to each client.
        """
        up = dict.fromkeys(down, 0)
        return self._phase(self._crossings.evaluation, self._crossings.batches, down, up, round, "evaluation")

    def alone(self, client: int) -> ClientTime:
        """Returns where the time of one step goes, of a client that has the trunk for itself."""
        messages = self._crossings.training(self._crossings.sizes[:1])
        steps = [crossing for crossing in messages if _is_of_step(crossing)]
        own = [replace(crossing, client=client) for crossing in steps]
        phase = ClientPhase(0, 0, own)
        # The messages of adapters have no bytes here, and would still take half a round trip each.
        with_messages = self.virtual.replay({client: phase}, 1, "training").spent[client]
        without = self.virtual.replay({client: ClientPhase(0, 0)}, 1, "training").spent[client]
        time = ClientTime()
        time.add_all(with_messages)
        time.add_all(ClientTime({place: -seconds for place, seconds in without.seconds.items()}))
        return time

    def _phase(
        self,
        crossings: Crossings,
        sizes: Sequence[int],
        down: Mapping[int, int],
        up: Mapping[int, int],
        round: int,
        name: str,
    ) -> PhaseTime:
        """Replays a phase, as a whole or in part.

        Args:
            crossings: Returns the messages of a client for some of the steps or batches.
            sizes: Sequences of each step or batch.
            down: Bytes of the request to each client.
            up: Bytes of each client's answer.
            round: Number of the round.
            name: Name of the phase.
        """
        like = self._played_for(sorted(down))
        clients = sorted({*like.values()})
        field = self.virtual.field
        if len(clients) < len(down):
            self.thins = True
            field = _thinned(field, len(clients) / len(down))

        def replayed(count: int) -> PhaseTime:
            messages = crossings(sizes[:count])
            phases = {}
            for client in clients:
                own = [replace(crossing, client=client) for crossing in messages]
                phases[client] = ClientPhase(down[client], up[client], own)
            return replay(field, phases, round, name)

        # At least 1, since the limit is divided by it: a phase may be without clients, and a step without messages.
        a_step = max(1, len(crossings(sizes[:1]))) * max(1, len(clients))
        # A third of the limit, since n and 2n steps are replayed: 3n together.
        played = max(1, self._limits.crossings // a_step // 3)
        # A phase that is hardly longer than its replayed part is replayed as a whole.
        if a_step * len(sizes) <= self._limits.crossings or 2 * played >= len(sizes):
            time = replayed(len(sizes))
        else:
            self.extends = True
            short = replayed(played)
            long = replayed(2 * played)
            time = _extended(short, long, (len(sizes) - 2 * played) / played)
        arrivals = {client: time.arrivals[like[client]] for client in like}
        return PhaseTime(arrivals, {client: time.spent[like[client]] for client in like})

    def _played_for(self, clients: Sequence[int]) -> dict[int, int]:
        """Returns, for each client of a phase, the client that is replayed in its place: mostly itself."""
        field = self.virtual.field
        stride = -(-len(clients) // self._limits.clients)  # rounded up
        if stride < 2:
            return {client: client for client in clients}

        def kind(client: int) -> tuple[object, ...]:
            return field.replica(client), *field.profiles[client].document().values(), client

        # Neighbours in this order have like lines and devices, so that one can stand for the next ones.
        ordered = sorted(clients, key=kind)
        return {client: ordered[place - place % stride] for place, client in enumerate(ordered)}


@dataclass(frozen=True)
class _SlowerTrunk:
    """Compute times with a slower trunk.

    Attributes:
        compute: The compute times.
        share: Speed of the trunk as a share of its own.
    """

    compute: Compute
    share: float

    def seconds(self, task: Task, rows: int, length: int) -> float:
        """Returns the seconds of a task."""
        seconds = self.compute.seconds(task, rows, length)
        return seconds / self.share if task.startswith("trunk") else seconds


def _thinned(field: Place, share: float) -> Place:
    """Returns a place whose trunk has a share of its line and of its speed, for a share of its clients."""
    link = TrunkLink(field.link.uplink_mbps * share, field.link.downlink_mbps * share)
    return replace(field, link=link, compute=_SlowerTrunk(field.compute, share))


def with_network(config: Config) -> Config:
    """Returns settings that name a network: `HOME` if the run's name none."""
    return replace(config, network=replace(config.network, profile=config.network.profile or HOME))


def compute_on(parties: Parties, client: Hardware, trunk: Hardware) -> Compute:
    """Returns the compute times of a run on some devices; recorded ones if the settings name them.

    Args:
        parties: The parties of the run.
        client: Device of each client with the compute factor 1.
        trunk: Device of the trunk.

    Raises:
        SettingError: The recorded times are wrong.
    """
    config = parties.config
    if config.network.compute:
        return read_recorded(config.network.compute)
    return StatedCompute(operations_of(config), client.speed(config.dtype), trunk.speed(config.dtype))


def _is_of_step(crossing: Crossing) -> bool:
    """Returns True for a message of a training step, False for the sample behind it."""
    return crossing.kind in ("forward", "backward", "coefficient")


def _extended(short: PhaseTime, long: PhaseTime, further: float) -> PhaseTime:
    """Returns a phase that goes on as the second part of a longer one does.

    Args:
        short: Its first n steps.
        long: Its first 2n steps.
        further: Further steps, as a multiple of n.

    Example:
        >>> short, long = (PhaseTime({0: end}, {0: ClientTime({"wire_up": end})}) for end in (3.0, 5.0))
        >>> _extended(short, long, further=4).arrivals
        {0: 13.0}
    """
    arrivals = {}
    spent = {}
    for client, end in long.arrivals.items():
        arrivals[client] = end + further * (end - short.arrivals[client])
        before = short.spent[client].seconds
        places = long.spent[client].seconds
        in_all = {}
        for name, own in places.items():
            in_all[name] = own + further * (own - before[name])
        spent[client] = ClientTime(in_all)
    return PhaseTime(arrivals, spent)
