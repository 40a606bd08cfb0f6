"""Bytes by step, round and run, by kind and direction, in the names of summary.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fedsplit.client.measures import load_measures
from fedsplit.corpora.shards import spread, steps_of_epoch
from fedsplit.demands import REFERENCE
from fedsplit.estimation.adapter_traffic import rounds_of_adapters
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic, Traffic
from fedsplit.federation.evaluation import clients_that_measure, is_due
from fedsplit.metrics.metric import asked_by


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


def run_traffic(parties: Parties) -> RunTraffic:
    """Returns the bytes of a run.

    Args:
        parties: The parties of the run.

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
    by_size = {rows: counted.step(rows) for rows in {*sizes}}
    training: Traffic = sum((by_size[rows] for rows in sizes), Counter())
    training += _evaluation(parties, counted, sample_sizes(parties), after_training=True)
    evaluation = _evaluation(parties, counted, evaluation_sizes(parties), after_training=False)

    config = parties.config
    measuring = len(clients_that_measure(config))
    rounds = []
    trained = []
    for number, adapters in enumerate(rounds_of_adapters(parties)):
        count = len(adapters.trained)
        evaluated = measuring if is_due(config, number) else 0
        rounds.append(adapters.traffic + _times(training, count) + _times(evaluation, evaluated))
        trained.append(count)
    return RunTraffic(by_size[max(sizes)], training + evaluation, rounds, len(sizes), trained)


def step_sizes(parties: Parties) -> list[int]:
    """Returns the number of sequences of each local step of a round.

    Example:
        >>> from fedsplit.estimation.party_shapes import Workload
        >>> from fedsplit.settings.documents import build
        >>> step_sizes(Parties(build({"train.epochs": 2}), Workload(sequences=6)))
        [4, 2, 4, 2]
    """
    train = parties.config.train
    size = train.batch_size * train.accumulation
    if not train.epochs:
        return [size] * train.steps
    available = parties.workload.sequences
    count = min(available, train.samples) if train.samples else available
    steps = steps_of_epoch(count, size)
    last = count - (steps - 1) * size
    return ([size] * (steps - 1) + [last]) * train.epochs


def evaluation_sizes(parties: Parties) -> list[int]:
    """Returns the number of sequences of each batch of a client's evaluation."""
    config = parties.config
    count = min(config.eval.samples, parties.workload.held_out or config.eval.samples)
    count -= count % parties.demands.rows  # pairs are not divided
    size = config.train.batch_size
    return [len(batch) for batch in torch.arange(count).split(size)]


def sample_sizes(parties: Parties) -> list[int]:
    """Returns the number of sequences of each batch that a client measures right after its local steps."""
    sizes = evaluation_sizes(parties)
    count = -(-parties.config.eval.after // parties.config.train.batch_size)  # rounded up
    chosen = spread(torch.arange(len(sizes)), count).tolist()
    return [sizes[number] for number in chosen]


def _evaluation(parties: Parties, counted: StepTraffic, sizes: list[int], after_training: bool) -> Traffic:
    """Returns the bytes of an evaluation of batches. Metrics are not measured right after training."""
    _, metrics = load_measures(parties.config)
    asked = set() if after_training else asked_by(*metrics.values())
    is_of_pairs = parties.demands.mean_over == "pairs"
    has_reference = REFERENCE in asked or (is_of_pairs and parties.demands.compares)
    by_size = {rows: counted.evaluation(rows, has_reference) for rows in {*sizes}}
    return sum((by_size[rows] for rows in sizes), Counter())


def _times(traffic: Traffic, count: int) -> Traffic:
    """Returns the bytes of several times the same."""
    return Counter({kind: nbytes * count for kind, nbytes in traffic.items()})
