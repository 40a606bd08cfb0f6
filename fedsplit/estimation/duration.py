"""Seconds of a step, of a round and of the run, by the virtual clock, and what limits a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.estimation.adapter_traffic import PLAYED, RoundOfAdapters
from fedsplit.estimation.phase_clock import Clock
from fedsplit.federation.evaluation import clients_that_measure, is_due
from fedsplit.federation.virtual_time import TrainingTime
from fedsplit.network.times import ClientTime
from fedsplit.settings.config import Config

_CROWDED = 2.0
"""Multiple of the seconds on the wire alone, from which the trunk's line limits a client and not the client's own."""


@dataclass(frozen=True)
class RoundSeconds:
    """Seconds of a round on the virtual clock.

    Attributes:
        training: Seconds until the server aggregates: adapters down, local steps, adapters up.
        evaluation: Seconds of the evaluation; 0 for a round without one.
    """

    training: float
    evaluation: float

    @property
    def total(self) -> float:
        """Seconds of the round."""
        return self.training + self.evaluation


@dataclass(frozen=True)
class Seconds:
    """Seconds of a step and a round.

    Attributes:
        step: Seconds of a step of the client that sets the pace of the round, while it has the trunk for itself.
        client: Seconds of the step in which the client waits for its own computing.
        trunk: Seconds of the step in which the client waits for the trunk.
        wire: Seconds of the step in which the client waits for a message on its way.
        training: Seconds of the training of the last round, of all clients together.
        evaluation: Seconds of the evaluation of the last round.
        limit: What limits a round: "client", "trunk", "wire" (a client's line) or "trunk_wire" (the trunk's line).
    """

    step: float
    client: float
    trunk: float
    wire: float
    training: float
    evaluation: float
    limit: str

    @property
    def round(self) -> float:
        """Seconds of a round."""
        return self.training + self.evaluation


def seconds_of(config: Config, clock: Clock, adapters: RoundOfAdapters) -> Seconds:
    """Returns the seconds of a step and of the last round.

    Args:
        config: Settings of the run.
        clock: The virtual clock.
        adapters: Adapters of the round.
    """
    training = clock.training(config.rounds, adapters.down, adapters.up)
    busy = {client: _busy(time) for client, time in training.phase.spent.items()}
    # Nobody trains in a last round in which all clients are absent. Client 0 then stands for all.
    pace = max(busy, key=lambda client: busy[client], default=0)
    alone = clock.alone(pace)
    in_crowd = training.phase.spent.get(pace, alone)
    # The same round without the others, adapters included.
    own_down = {client: adapters.down[client] for client in busy if client == pace}
    own_up = {client: adapters.up[client] for client in busy if client == pace}
    without_others = clock.training(config.rounds, own_down, own_up).phase.spent.get(pace, alone)
    return Seconds(
        _busy(alone),
        alone.seconds["client_compute"],
        alone.seconds["trunk_compute"],
        _wire(alone),
        training.seconds,
        clock.evaluation(config.rounds, to_measure(config, adapters)).end,
        _limit(in_crowd, _wire(without_others)),
    )


def rounds_of(config: Config, clock: Clock, adapters: Sequence[RoundOfAdapters]) -> list[RoundSeconds]:
    """Returns the seconds of each round; the first entry is the evaluation before the first round.

    Rounds that are not played, after `PLAYED`, take as long as the two before them in turn.

    Args:
        config: Settings of the run.
        clock: The virtual clock.
        adapters: Adapters of each round.
    """
    played = adapters[: PLAYED + 1]
    training = [_seconds(of_round.time) for of_round in played]
    measured: dict[int, float] = {}
    rounds = []
    for number in range(config.rounds + 1):
        # As in `rounds_of_adapters`: later rounds repeat the last two that were played, in turn.
        like = number if number < len(played) else PLAYED - number % 2
        evaluation = 0.0
        if is_due(config, number):
            # A replay takes a while. Rounds that are alike share one.
            if like not in measured:
                measured[like] = clock.evaluation(like, to_measure(config, adapters[like])).end
            evaluation = measured[like]
        rounds.append(RoundSeconds(training[like], evaluation))
    return rounds


def to_measure(config: Config, adapters: RoundOfAdapters) -> dict[int, int]:
    """Returns the bytes that each client that measures is sent."""
    return dict.fromkeys(clients_that_measure(config), adapters.news + adapters.measured)


def _seconds(time: TrainingTime | None) -> float:
    """Returns the seconds of a training; 0 without one."""
    return 0.0 if time is None else time.seconds


def _busy(time: ClientTime) -> float:
    """Returns the seconds of a client in which it does not wait for other clients."""
    return time.total - time.seconds["others"]


def _wire(time: ClientTime) -> float:
    """Returns the seconds of a client in which messages are on their way."""
    return time.seconds["wire_up"] + time.seconds["wire_down"]


def _limit(time: ClientTime, wire_alone: float) -> str:
    """Returns what takes the most of a client's training.

    Args:
        time: Where the client's time went among the others.
        wire_alone: Seconds on the wire of the same round, of a client that has the trunk for itself.

    Example:
        >>> time = ClientTime()
        >>> time.add("wire_up", 9.0)
        >>> time.add("trunk_queue", 5.0)
        >>> _limit(time, wire_alone=8.0), _limit(time, wire_alone=1.0)
        ('wire', 'trunk_wire')
    """
    seconds = time.seconds
    wire = "trunk_wire" if _wire(time) > _CROWDED * wire_alone else "wire"
    loads = {
        "client": seconds["client_compute"],
        wire: _wire(time),
        "trunk": seconds["trunk_queue"] + seconds["trunk_compute"],
    }
    return max(loads, key=lambda name: loads[name])
