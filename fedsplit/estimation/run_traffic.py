"""Bytes by step, round and run, by kind and direction, in the names of summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.estimation.adapter_traffic import RoundOfAdapters, rounds_of_adapters
from fedsplit.estimation.crossings import compares_at_evaluation, evaluation_sizes, sampled_batches, step_sizes
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic, Traffic
from fedsplit.federation.evaluation import clients_that_measure, is_due


@dataclass(frozen=True)
class RunTraffic:
    """Bytes of a run.

    Attributes:
        step: Bytes of one full step of one client.
        client_round: Bytes of one client in the last round, with training and evaluation, without adapters.
        rounds: Bytes of all clients by round; the first entry is the evaluation before the first round.
        steps: Local steps of a client in a round.
        trained: Number of clients that train, by round.
    """

    step: Traffic
    client_round: Traffic
    rounds: list[Traffic]
    steps: int
    trained: list[int]

    @property
    def run(self) -> Traffic:
        """Bytes of the whole run."""
        return sum(self.rounds, Counter())


def run_traffic(parties: Parties, adapters: Sequence[RoundOfAdapters] | None = None) -> RunTraffic:
    """Returns the bytes of a run.

    Args:
        parties: The parties of the run.
        adapters: Adapters of each round; None for a run in which nobody is absent or late.

    Raises:
        InputError: The strategy fails, or its class cannot be made.

    Example:
        >>> from fedsplit.settings.config import Config
        >>> traffic = run_traffic(Parties(Config(rounds=2)))
        >>> traffic.run["activation_up"] == 2 * 8 * 10 * traffic.step["activation_up"]
        True
    """
    counted = StepTraffic(parties)
    sizes = step_sizes(parties)
    # Steps of one size send equal bytes. Encoding tensors takes a while, and is done once for each size.
    by_size = {rows: counted.step(rows) for rows in {*sizes}}
    training: Traffic = sum((by_size[rows] for rows in sizes), Counter())
    training += _evaluation(parties, counted, [*sampled_batches(parties).values()], after_training=True)
    evaluation = _evaluation(parties, counted, evaluation_sizes(parties), after_training=False)

    config = parties.config
    measuring = len(clients_that_measure(config))
    rounds = []
    trained = []
    for number, of_round in enumerate(rounds_of_adapters(parties) if adapters is None else adapters):
        count = len(of_round.down)
        evaluated = measuring if is_due(config, number) else 0
        rounds.append(of_round.traffic(evaluated) + _times(training, count) + _times(evaluation, evaluated))
        trained.append(count)
    # A full step is the largest one, since the last step of an epoch may be smaller.
    return RunTraffic(by_size[max(sizes)], training + evaluation, rounds, len(sizes), trained)


def _evaluation(parties: Parties, counted: StepTraffic, sizes: list[int], after_training: bool) -> Traffic:
    """Returns the bytes of an evaluation of batches."""
    has_reference = compares_at_evaluation(parties, after_training)
    by_size = {rows: counted.evaluation(rows, has_reference) for rows in {*sizes}}
    return sum((by_size[rows] for rows in sizes), Counter())


def _times(traffic: Traffic, count: int) -> Traffic:
    """Returns the bytes of several times the same."""
    return Counter({kind: nbytes * count for kind, nbytes in traffic.items()})
